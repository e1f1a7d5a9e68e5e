"""What can go wrong, by whose mistake it is. Every message names the layer, field or batch and what to do."""


class HWPQError(Exception):
    """Base of the errors below. Whoever catches it finds the model as it was before the call."""


class ConfigError(HWPQError, ValueError):
    """A field of `HWPQConfig` has a value it does not take, or a pattern matches nothing."""


class CalibrationError(HWPQError, RuntimeError):
    """The calibration data is empty, refused by the model, or leads to NaN or Inf."""


class ModelError(HWPQError, ValueError):
    """The model cannot be converted as it stands: in training mode, on meta, converted already, nothing to do."""


class CheckpointError(HWPQError, ValueError):
    """A checkpoint is not one that this version reads, is incomplete, or holds values that no packed weight has."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
