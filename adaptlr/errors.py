"""The one exception that is adaptlr's own."""


class TrainingDiverged(RuntimeError):
    """The guard has spent its budget: nothing it may do brings the run back.

    The message tells what was seen and done, and what to try. The parameters are those of the last
    step that was taken.
    """
