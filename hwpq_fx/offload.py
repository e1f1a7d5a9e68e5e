"""Converting a transformers checkpoint decoder block by decoder block: the model has to fit nowhere.

What runs before the blocks (embeddings, masks, positions) runs once for each batch and leaves the first hidden states
and the other arguments of the blocks on disk. Then one block after the other is read from the shards and run on all
hidden states, which become the next block's: those of the dense model and, where layers are converted in order, those
of the converted one. The model is run without a cache of keys and values, so masks and bits are those of
`hwpq_fx.convert` on the same batches with use_cache=False, but for what the order of sums rounds otherwise.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from .blocks import Became, Block, compress_one_by_one
from .calibration import tracked
from .checkpoint import Stored, split, table_from_json, table_to_json
from .compress import Compressed, cannot_compress, dense_line, stacked_lines
from .config import PLAIN, HWPQConfig, check_for_model
from .context import as_written
from .errors import CalibrationError, ConfigError, ModelError
from .in_order import NotInOrder, compress_block_in_order
from .layers import Layer, check_patterns, layers_of, left_out
from .report import REPORT_METADATA, LayerReport, Report
from .resume import Run, fingerprint
from .shards import INDEX, Shards, metadata_of, write, written
from .skeleton import Call, Front, Skeleton
from .statistics import Call as Told

logger = logging.getLogger("hwpq_fx")
BLOCK = "hwpq_fx.block"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    batches: Iterable[Any] | None = None,
    config: HWPQConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = False,
) -> Report:
    """Convert the causal language model in the folder `source` (safetensors) into the new folder `out`, with one
    decoder block in memory at a time. `from_pretrained(out)` loads it; its bits are those of `hwpq_fx.convert` on the
    batches with use_cache=False, up to rounding.

    batches: token ids, int64 [B, L], or mappings with "input_ids" and perhaps a 2-D "attention_mask"; None converts
    without calibration.
    device: where blocks run and are compressed.
    resume: go on with what a killed run with the same model, batches and config left, to the same bits, and start
    where there is nothing. One process at a time works on one `out`.

    Layers are converted in order (`config.sequential`) block by block: where one cannot be, its layers alone are
    converted one by one. Layers outside of the blocks stay dense.

    In memory are the dense weights of one block and the activations of one batch. In order there are two runs of that
    batch, the block's new weights, and the statistics of one input, what compressing takes besides; one by one the
    statistics of all inputs of the block, or one layer and what compressing it takes. `config.curvature_bytes` holds
    for each input, or each block, by itself. On disk, beside `out`, are the hidden states of all batches, twice; in
    order four times.

    Raises FileExistsError where `out` is there, another process at work on it, or an unfinished run that is not to be
    resumed; CheckpointError where the run to resume is another one or damaged; ConfigError, CalibrationError and
    ModelError as `convert` does. Whatever is raised, finished blocks stay, to be resumed.
    """
    source, out, device = Path(source), Path(out).absolute(), torch.device(device)
    config = check_for_blocks(config)
    calls = None if batches is None else [_call(batch, number) for number, batch in enumerate(batches)]
    if calls == []:
        raise CalibrationError("calibration ran no batch: batches is empty")
    with as_written():
        conversion = _Conversion(Skeleton(Shards(source), device), config, calls)
        files = [source / "config.json", *conversion.shards.files]
        with closing(Run(out, fingerprint(files, calls, config, device), resume)) as run:
            if run.finished is None:
                run.finish(conversion.run(run, progress).to_dict())
    assert run.finished is not None
    return Report.from_dict(run.finished)


def check_for_blocks(config: HWPQConfig | None) -> HWPQConfig:
    """A copy of the config, found fit for this. Raises ConfigError."""
    config = check_for_model(config)
    if config.bounded:
        raise ConfigError("max_loss, max_divergence and min_speedup weigh all layers: use hwpq_fx.convert")
    if config.packing_format != PLAIN:
        raise ConfigError(f'packing_format {config.packing_format!r} is for models in memory; checkpoints are "plain"')
    return config


def _call(batch: Any, number: int) -> dict[str, Any]:
    """A batch as named arguments of the model."""
    if isinstance(batch, torch.Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor):
        return dict(batch)
    raise TypeError(f'batch {number} is {type(batch).__name__}: token ids, or a mapping with "input_ids", are wanted')


class _Conversion:
    """Of one checkpoint: a shard for each block, then shards for the rest."""

    def __init__(self, skeleton: Skeleton, config: HWPQConfig, batches: list[dict[str, Any]] | None):
        self.skeleton, self.shards, self.config, self.batches = skeleton, skeleton.shards, config, batches
        self.layers = layers_of(skeleton.model)
        check_patterns(self.layers, config)
        indices = range(len(skeleton.blocks))
        inside = [[name for name, _ in skeleton.tensors_in(index)] for index in indices]
        self.rest = self._grouped(set(skeleton.stored.values()).difference(*inside), self.shards.nbytes(inside[0]))
        self.padding = [Told.of(at, batch.get("attention_mask")) for at, batch in enumerate(batches or [])]
        self.table: dict[str, Stored] = {}
        self.report = Report()
        if all(self._reason(layer) for index in indices for layer in self._layers_in(index)):
            self._outside()  # raises

    def _grouped(self, names: Iterable[str], limit: int) -> list[list[str]]:
        """`names` in groups of up to `limit` bytes, or one."""
        groups: list[list[str]] = []
        room = 0
        for name in sorted(names):
            size = self.shards.nbytes([name])
            if size > room:
                groups.append([])
                room = limit
            groups[-1].append(name)
            room -= size
        return groups

    def run(self, run: Run, progress: bool) -> Report:
        blocks, done = self.skeleton.blocks, 0
        files = len(blocks) + len(self.rest)
        places = [run.folder / f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
        while done < len(blocks) and places[done].exists():
            done += 1
        run.drop_hidden(before=done)
        calls = self._front(run, first=done == 0) if self.batches and done < len(blocks) else []
        with tracked(range(done, len(blocks)), "blocks", progress) as steps:
            for index in steps:
                self._block(index, calls, run, places[index])
        for file in places[: len(blocks)]:
            self._recall(file)
        self._outside()
        for names, file in zip(self.rest, places[len(blocks) :], strict=True):
            told = {REPORT_METADATA: json.dumps(self.report.to_dict())} if names is self.rest[-1] else {}
            write({name: self.skeleton.read(name, torch.device("cpu")) for name in names}, file, told)
        self._describe(run.folder, places)
        return self.report

    def _front(self, run: Run, first: bool) -> list[list[Call]]:
        """How each batch makes the model call its blocks; tensors go to disk, and the `first` hidden states."""
        front, calls = Front(self.skeleton), []
        for number, batch in enumerate(cast(list, self.batches)):
            on_device = {k: v.to(self.skeleton.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            hidden, called, tensors = front.run(on_device)
            calls.append(called)
            run.write_arguments(number, tensors)
            if first:
                run.write_hidden(0, number, hidden)
        return calls

    def _block(self, index: int, calls: list[list[Call]], run: Run, file: Path) -> None:
        told, became, blocked = Report(), None, Became()
        timed = partial(_timed, told.seconds)
        layers = [layer for layer in self._layers_in(index) if not self._reason(layer)]
        block = Block(self.skeleton, index, layers, [called[index] for called in calls], self.padding, run)
        in_order = bool(calls) and self.config.in_order
        if in_order and layers:
            try:
                became = compress_block_in_order(block, self.config, timed)
            except NotInOrder as error:
                told.one_by_one = f"{self.skeleton.prefix(index)[:-1]}: {error}"
                blocked |= error.blocked
                if self.config.sequential:  # asked for in so many words
                    logger.warning("sequential: %s; its layers are converted one by one instead", told.one_by_one)
        if became is None:
            free = replace(block, layers=[layer for layer in layers if layer.name not in blocked])
            became = blocked | compress_one_by_one(free, self.config, timed)
        if in_order and not block.last:
            with timed("run in order"):
                block.pass_on_converted(became)
        flat, table, told.layers = self._shard(index, became)
        # the next block's hidden states are there by now: where the shard is, it can be gone on from
        write(flat, file, {BLOCK: json.dumps({"layers": table_to_json(table), "report": told.to_dict()})})
        run.drop_hidden(before=index + 1)

    def _shard(
        self, index: int, became: Became
    ) -> tuple[dict[str, torch.Tensor], dict[str, Stored], list[LayerReport]]:
        """A block's shard, what its weights are, and the report's lines."""
        tensors: dict[str, torch.Tensor] = {}
        table: dict[str, Stored] = {}
        lines = []
        layers = {id(layer.parameter): layer for layer in self._layers_in(index) if layer.static_use}
        for name, dense in self.skeleton.tensors_in(index):
            layer = layers.get(id(dense))
            one = became.get(layer.name) or self._reason(layer) if layer else ""
            if isinstance(one, Compressed):
                flat, stored = split({name: one.weight}, self.skeleton.dtype)
                tensors |= {part: tensor.cpu() for part, tensor in flat.items()}
                table |= stored
                lines.append(one.line)
                continue
            tensors[name] = self.skeleton.read(name, torch.device("cpu"))
            if layer:
                lines.append(dense_line(layer, {}, one))
        return tensors, table, lines

    def _layers_in(self, index: int) -> list[Layer]:
        inside = {id(parameter) for parameter in self.skeleton.blocks[index].parameters()}
        return [layer for layer in self.layers if id(layer.parameter) in inside]

    def _reason(self, layer: Layer) -> str:
        """Why a layer stays dense whatever calibration sees, or ""."""
        use = layer.static_use
        unfit = cannot_compress(layer, [use], self.config) if use else "not a linear layer"
        return left_out(layer, self.config) or layer.unsure or unfit

    def _recall(self, file: Path) -> None:
        """Take over what the shard of a block says of it."""
        told = json.loads(metadata_of(file)[BLOCK])
        self.table |= table_from_json(told["layers"])
        report = Report.from_dict(told["report"])
        self.report.layers += report.layers
        self.report.one_by_one = self.report.one_by_one or report.one_by_one
        for phase, seconds in report.seconds.items():
            self.report.seconds[phase] = self.report.seconds.get(phase, 0.0) + seconds

    def _outside(self) -> None:
        """Finish the report, with what is not in the blocks."""
        known = {line.name for line in self.report.layers}
        for layer in self.layers:
            if layer.static_use is not None and layer.name not in known:
                self.report.layers.append(dense_line(layer, {}, self._reason(layer) or "outside of the decoder blocks"))
        self.report.layers += stacked_lines(self.skeleton.model)
        if not self.report.converted:
            why = "; ".join(f"{line.name}: {line.reason}" for line in self.report.layers[:5])
            raise ModelError(f"nothing is left to convert ({why})")

    def _describe(self, folder: Path, files: list[Path]) -> None:
        """Everything of the checkpoint but the tensors: what the source has, and what is different."""
        from .transformers_quantizer import HWPQTransformersConfig

        for path in self.shards.folder.iterdir():
            if path.is_file() and path.suffix not in WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copy2(path, folder / path.name)
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] = HWPQTransformersConfig(self.config, layers=self.table).to_dict()
        where: dict[str, str] = {}
        total = 0
        for file in files:
            shard = Shards.of(file)
            where |= dict.fromkeys(shard.where, file.name)
            total += shard.nbytes(list(shard.where))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        for name, content in ((INDEX, index), ("config.json", described)):
            with written(folder / name) as partial:
                partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
