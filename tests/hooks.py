"""Ways into a run for tests that disturb it."""

from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step


def before_steps(patch, call):
    """`call(model, step)` on the main thread before each step."""
    original = train_run.fit

    def fit(model, optimizer, steps, *others):
        def watched():
            for step in steps:
                call(model, step)
                yield step

        return original(model, optimizer, watched(), *others)

    patch.setattr(train_run, "fit", fit)


def on_outputs(patch, change):
    """What every micro-batch computes is `change(outputs)`."""
    original = train_step.StepFunction.prepare

    def prepare(self, *arguments):
        run = original(self, *arguments)
        return lambda: change(run())

    patch.setattr(train_step.StepFunction, "prepare", prepare)
