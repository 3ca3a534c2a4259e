"""Errors that a user can act on. One root, every class picklable, so they survive a trip between processes.

`ValueError` subclasses say that something given from outside is wrong; the rest say that something happened.
Each message is one line that names the thing, the place and the remedy.
"""


class VisualLatentsError(Exception):
    """Root of every error that this project raises on purpose."""


class ConfigError(VisualLatentsError, ValueError):
    """A config names a field, value or combination that cannot work."""


class DataError(VisualLatentsError, ValueError):
    """A file or record of a data set is missing, damaged or inconsistent."""


class ModelError(VisualLatentsError, ValueError):
    """A model folder cannot be used: missing parts, unknown family, wrong shapes."""


class HandshakeError(VisualLatentsError, ValueError):
    """Generator and anchor do not fit each other (width, K, dtype, protocol, prompt)."""


class ResourceError(VisualLatentsError):
    """The cluster or the machine lacks what the config asks for."""


class AnchorCallError(VisualLatentsError):
    """An anchor answered with something that is not an answer (shape, non-finite values, wrong request)."""


class NonFiniteReplyError(AnchorCallError):
    """An anchor's numbers are NaN or infinite; `images` are their places in the batch."""

    def __init__(self, message: str, images: list[int]):
        super().__init__(message, images)
        self.images = images

    def __str__(self) -> str:
        return str(self.args[0])


class AnchorLostError(VisualLatentsError):
    """An anchor stayed away past its deadline or used up its retries."""


class NonFiniteError(VisualLatentsError):
    """A loss or a gradient is NaN or infinite; the step was not taken."""


class ResponseError(VisualLatentsError, ValueError):
    """A generated response does not have the form that it should; `position` is the first wrong character."""

    def __init__(self, message: str, position: int):
        super().__init__(message, position)
        self.position = position

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(VisualLatentsError):
    """A checkpoint cannot be written or read."""
