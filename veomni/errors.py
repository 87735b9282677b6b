"""Typed errors. User-correctable errors exit with 78; a fault of the run exits with 70."""

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL
EXIT_BAD_INPUT = 78  # EX_CONFIG


class VeOmniError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the process ends with."""

    exit_code: int = EXIT_FAULT


class InputError(VeOmniError):
    """Something the user gave cannot work.

    Args:
        problem: What is wrong, naming the key, file or value.
        fix: What to change, in one sentence.
        field: The Python argument that is wrong, such as ``Ulysses.size``; a run that was started from a configuration
            names its key as well.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problem: str, fix: str, field: str = "") -> None:
        super().__init__(problem, fix, field)
        self.problem, self.fix, self.field = problem, fix, field

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"


class ConfigError(InputError):
    """An option has a wrong name or value."""


class LayoutError(InputError):
    """Mesh axes, world size, batch sizes or model shapes do not divide."""


class LaunchError(InputError):
    """The environment (torchrun, Slurm) contradicts what was asked for."""


class DeviceError(InputError):
    """An accelerator is missing, or has fewer devices than asked for."""


class DataError(InputError):
    """A dataset file or sample cannot be used."""


class MediaError(DataError):
    """An image, a video or audio cannot be used; the one type of error that ``on_bad_media="skip"`` skips."""


class LoopError(InputError):
    """A training loop calls the launcher's verbs in a way that cannot be right."""


class ModelError(InputError):
    """A model directory, configuration or architecture cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is damaged, foreign or does not fit the run."""


class MissingExtraError(InputError):
    """An optional ``package``, which an ``extra`` of veomni installs, is needed."""

    def __init__(self, package: str, extra: str, field: str = "") -> None:
        super().__init__(f"{package} is not installed", f"pip install 'veomni[{extra}]'", field)
        self.args = (package, extra, field)  # what it is pickled by

    @classmethod
    def check(cls, package: str, extra: str) -> None:
        """Raise this error if ``package`` cannot be imported."""
        from lightning_utilities.core.imports import RequirementCache

        if not RequirementCache(module=package):
            raise cls(package, extra)


class NonFiniteError(VeOmniError):
    """A gradient norm, a loss, router logits or parameters are not finite."""
