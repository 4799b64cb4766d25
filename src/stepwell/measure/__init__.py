"""What a model costs: counted, timed, estimated before it is trained, and met as a budget."""
