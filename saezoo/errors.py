"""Every error that a user can cause, as a tree.

    SaezooError              exit code 1: something outside went wrong
    ├── RegistryError        a registry file is malformed
    ├── DownloadError        a file is neither cached nor reachable, or is not the promised one
    ├── UploadError          the hub refuses an upload, or cannot be reached
    ├── WeightsError         a file of weights is corrupt, of another shape, or of an unsupported kind
    ├── TextError            the text or data set cannot be read, or is too short
    ├── TrainingError        a run cannot start, resume or go on
    │   └── DivergedError    because the loss or the weights of one SAE have left all bounds
    ├── VerificationError    a published value is not reproduced
    └── UsageError           exit code 2: the request itself is wrong (unknown name, bad range)

The command line prints these as one line, without a traceback. Anything else is a bug and shows its traceback.
"""

import reprlib


class SaezooError(Exception):
    """Base of all: the message says what is wrong, the offending value, and what to do."""

    exit_code = 1


class RegistryError(SaezooError):
    """A registry file is malformed; the message begins with `file:line:`."""


class DownloadError(SaezooError):
    """A file is neither in the cache nor reachable, or its bytes are not the promised ones."""


class UploadError(SaezooError):
    """The hub refuses an upload, or cannot be reached."""


class WeightsError(SaezooError):
    """A file of weights is corrupt, has other shapes than declared, or is of an unsupported kind."""


class TextError(SaezooError):
    """The text or data set cannot be read, or holds too few tokens."""


class TrainingError(SaezooError):
    """A training run cannot start, resume or go on."""


class DivergedError(TrainingError):
    """The loss or the weights of one SAE in training have left all bounds."""

    def __init__(self, name: str, what: str) -> None:
        """`name`: of the SAE, as in log.csv."""
        super().__init__(f"layer {name}: {what}; lower the learning rate")
        self.name = name


class VerificationError(SaezooError):
    """A published value is not reproduced, or nothing could be measured."""


class UsageError(SaezooError):
    """The request itself is wrong: an unknown name, a layer out of range, contradictory options."""

    exit_code = 2


def shown(value: object, most: int = 100) -> str:
    """`value` for a message: one line of printable characters, at most `most` of them and three dots.

    What comes from a file may be megabytes long, or hold what a terminal takes for commands.
    """
    text = value if isinstance(value, str) else reprlib.repr(value)
    cut = text[: most + 1]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in cut).split())
    return line if len(cut) <= most else line[:most] + "..."
