"""Import torchao without its notices on machines that have no GPU: there, its CUDA libraries cannot load, and every
import of it says so, as well as how torch would rather have it register enums."""

import importlib
import logging

import torch

MODULES = ("torchao.quantization", "torchao.float8.inference", "torchao.quantization.quantize_.workflows")


def import_torchao() -> None:
    """Import what this package uses of torchao; below errors, in silence unless there is a GPU to lose."""
    loggers = [] if torch.cuda.is_available() else [logging.getLogger(n) for n in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        for module in MODULES:
            importlib.import_module(module)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
