"""The six stages of a run, one file each: score, grid, joint, select, distill, deliver.

    score    -> Importance        of every unit                        (pruning/ranking.py)
    grid     -> Ladder            nested candidates                    (models/ladder.py)
    joint    -> SharedWeights     trained; saved as a Trained          (training/loop.py)
    select   -> Choice            the assistant, what every rule says  (report/result.py)
    distill  -> Rung              trained; saved as a Trained          (training/loop.py)
    deliver  -> Result            figures of all models; all files     (report/result.py)

A stage takes the setting and the results before it, and returns its own, which is saved and says what it
cost: it is the unit of resume.
"""
