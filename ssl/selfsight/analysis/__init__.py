"""`selfsight show analysis`: how a checkpoint attends and what its features are like, block by block."""


class AnalysisError(ValueError):
    """This checkpoint or these images cannot be analysed; one sentence says why and what would work."""
