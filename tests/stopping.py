"""How tests stop a training on the way."""


class StopAt:
    """A callback that stops a training after a step."""

    def __init__(self, last):
        self.last = last

    def step(self, training, row):
        if row["step"] == self.last:
            training.stop()
