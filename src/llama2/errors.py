"""Every exception this library raises on purpose.

A message gives the value, the bound it broke and the remedy. Each class also derives from the builtin that
`transformers` users catch for the same mistake, so `except ValueError` in existing code keeps working.

    Llama2Error
    |- ConfigError            (ValueError)    a configuration that cannot work
    |- InputError             (ValueError)    a wrong argument: shapes, ids, generation settings, prompts
    |  |- TokenizerError                      text, ids or tokenizer settings that cannot be encoded or decoded
    |  |- ContextLengthError                  a prompt, with its answer, that the context or the cache cannot hold
    |  '- DeviceError        (RuntimeError)  a device on which the call makes no sense
    |- CheckpointError        (OSError)       a file that is missing, truncated, malformed or of a foreign kind
    |  '- MismatchError       (RuntimeError)  the tensors do not fit the configuration
    '- MissingDependencyError (ImportError)   an optional package, compiler or device that this call needs
"""


class Llama2Error(Exception):
    """Root of the tree: catch this to catch every deliberate error of the library."""


class ConfigError(Llama2Error, ValueError):
    """A configuration value that cannot work."""


class InputError(Llama2Error, ValueError):
    """A wrong argument of a call."""


class TokenizerError(InputError):
    """Text, ids or settings that a tokenizer cannot handle."""


class ContextLengthError(InputError):
    """A prompt, with its answer, of `needed` tokens where `limit` fit."""

    def __init__(self, message: str, needed: int, limit: int) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit

    def __reduce__(self) -> tuple[type["ContextLengthError"], tuple[str, int, int]]:
        return type(self), (str(self), self.needed, self.limit)


class DeviceError(InputError, RuntimeError):
    """A device on which the call makes no sense."""


class CheckpointError(Llama2Error, OSError):
    """A checkpoint file that is missing, truncated, malformed or not a Llama model."""


class MismatchError(CheckpointError, RuntimeError):
    """Tensors whose names or shapes do not fit the configuration."""


class MissingDependencyError(Llama2Error, ImportError):
    """An optional package, compiler or device that the call needs and this machine lacks."""


def needs_torch(what: str, extra: str = "torch") -> MissingDependencyError:
    """The error where torch is missing. what: the subject of the sentence; extra: the one that brings torch."""
    return MissingDependencyError(f"{what} needs torch, which is not installed: run `pip install 'llama2[{extra}]'`")
