"""ScaleKD: a pretrained transformer teaches a student of any architecture.

Fan, Li, Liu, Chen and Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", NeurIPS 2024.

    stages.py      where the stages of a model end, and how their states lie: read from the model
    projector.py   the cross-attention projector: the student's map becomes tokens of the teacher
    views.py       dual-view feature mimicking: distances of features, with and without their spatial mean
    loss.py        all of it, with the teacher's own parameters between its two last stages

The equations, the defaults and where ours differ: docs/method.md.
"""
