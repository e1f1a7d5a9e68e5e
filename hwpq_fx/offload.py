"""Converting a transformers checkpoint decoder block by decoder block: the model has to fit nowhere.

What runs before the blocks (embeddings, masks, positions) runs once for each batch and leaves the first hidden states
and the other arguments of the blocks on disk. Then one block after the other is read from the shards and observed on
all hidden states, which become the next block's; and its layers are compressed one by one. What is observed is the
dense model without a cache of keys and values, so masks and bits are those of `hwpq_fx.convert` on the same batches
with use_cache=False, but for what the order of sums rounds otherwise.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .calibration import tracked
from .checkpoint import Stored, split, table_from_json, table_to_json
from .compress import Statistics, cannot_compress, check_weight, compress, dense_line, not_reached, stacked_lines
from .config import PLAIN, HWPQConfig, check_for_model
from .context import as_written
from .errors import CalibrationError, ConfigError, ModelError
from .layers import Layer, check_patterns, layers_of, left_out
from .report import REPORT_METADATA, LayerReport, Report
from .resume import Run, fingerprint
from .shards import INDEX, Shards, metadata_of, write, written
from .skeleton import Call, Front, Skeleton, hidden_of, run_block
from .statistics import CalibrationRecorder

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

    Layers outside of the blocks stay dense. `config.curvature_bytes` holds for each block by itself. In memory are the
    dense weights of one block, the statistics of its inputs and the activations of one batch, or one layer and what
    compressing it takes; on disk, beside `out`, the hidden states of all batches, twice.

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
    if config.sequential:
        raise ConfigError("sequential is for hwpq_fx.convert: here every block is observed as the dense model runs it")
    if (config.max_loss, config.min_speedup) != (None, None):
        raise ConfigError("max_loss and min_speedup weigh all layers against each other: use hwpq_fx.convert")
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
        inside = [self._stored(index) for index in range(len(skeleton.blocks))]
        self.rest = self._grouped(set(skeleton.stored.values()).difference(*inside), self.shards.nbytes(inside[0]))
        self.table: dict[str, Stored] = {}
        self.report = Report()
        if all(self._reason(layer) for block in skeleton.blocks for layer in self._layers_in(block)):
            self._outside()  # raises

    def _stored(self, index: int) -> list[str]:
        """What block `index` is in the checkpoint."""
        names = self.skeleton.blocks[index].state_dict(keep_vars=True)
        return [self.skeleton.stored[self._prefix(index) + name] for name in names]

    def _prefix(self, index: int) -> str:
        return f"{self.skeleton.name}.{index}."

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
            write({name: self._read(name, torch.device("cpu")) for name in names}, file, told)
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
        block, seconds, start, seen = self.skeleton.blocks[index], {}, time.perf_counter(), None
        if calls:
            seen = self._observe(index, [called[index] for called in calls], run)
            seconds["observe"] = time.perf_counter() - start
            start = time.perf_counter()
        flat, table, lines = self._compress(index, block, seen)
        seconds["choose and pack"] = time.perf_counter() - start
        told = {"layers": table_to_json(table), "report": Report(lines, seconds).to_dict()}
        # the next block's hidden states are there by now: where the shard is, it can be gone on from
        write(flat, file, {BLOCK: json.dumps(told)})
        run.drop_hidden(before=index + 1)

    def _observe(self, index: int, calls: list[Call], run: Run) -> dict[int, Statistics]:
        """What the layers of the dense block see in all batches, by id of the parameter; what it makes of them goes to
        disk."""
        block, device = self.skeleton.blocks[index], self.skeleton.device
        recorder = CalibrationRecorder(self.config.gathered_bytes)
        layers = [layer for layer in self._layers_in(block) if not self._reason(layer)]
        with self.skeleton.filled(self._prefix(index), block), _observed(layers, recorder):
            for number, call in enumerate(calls):
                recorder.begin_call(cast(list, self.batches)[number].get("attention_mask"))
                tensors = [tensor.to(device) for tensor in run.arguments(number)]
                made = hidden_of(run_block(block, call, run.hidden(index, number).to(device), tensors))
                if index + 1 < len(self.skeleton.blocks):
                    run.write_hidden(index + 1, number, made)
        return recorder.uses

    def _compress(
        self, index: int, block: nn.Module, seen: dict[int, Statistics] | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Stored], list[LayerReport]]:
        """The block's shard, what its weights are, and the report's lines. Takes the statistics out of `seen`."""
        tensors: dict[str, torch.Tensor] = {}
        table: dict[str, Stored] = {}
        lines = []
        layers = {id(layer.parameter): layer for layer in self._layers_in(block)}
        for name, dense in zip(self._stored(index), block.state_dict(keep_vars=True).values(), strict=True):
            weight, layer = self._read(name, self.skeleton.device), layers.get(id(dense))
            if layer is None or layer.static_use is None:
                tensors[name] = weight.cpu()
                continue
            statistics: Statistics = {layer.static_use: []}
            reason = self._reason(layer)
            if seen is not None and not reason:
                statistics = seen.pop(id(layer.parameter), {})
                reason = not_reached(statistics)
            if reason:
                tensors[name] = weight.cpu()
                lines.append(dense_line(layer, {}, reason))
                continue
            check_weight(replace(layer, parameter=cast(nn.Parameter, weight)))
            made, line = compress(layer.name, weight, statistics, self.config)
            flat, stored = split({name: made}, self.skeleton.dtype)
            tensors |= {part: tensor.cpu() for part, tensor in flat.items()}
            table |= stored
            lines.append(line)
        return tensors, table, lines

    def _read(self, name: str, device: torch.device) -> torch.Tensor:
        dtype = self.skeleton.model.state_dict(keep_vars=True)[name].dtype
        return self.shards.load(name, device, dtype)

    def _layers_in(self, block: nn.Module) -> list[Layer]:
        inside = {id(parameter) for parameter in block.parameters()}
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
def _observed(layers: list[Layer], recorder: CalibrationRecorder) -> Iterator[None]:
    """Calls of the layers are seen by `recorder`. Layers that are given the same tensor share what is gathered, as in
    `convert`."""
    leaders: dict[int, Layer] = {}
    last: tuple[Layer, torch.Tensor, int] | None = None

    def seen(layer: Layer, x: torch.Tensor) -> None:
        nonlocal last
        key, use = id(layer.parameter), layer.static_use
        assert use is not None
        same = last is not None and x is last[1] and x._version == last[2]
        leader = last[0] if last is not None and same else layer
        if leaders.setdefault(key, leader) is not leader:
            raise CalibrationError(f"{layer.name} shares its input with another layer in some batches, not in others")
        if leader is layer:
            recorder.observe(x, (layer.parameter,), (use,))
            last = layer, x, x._version
        else:
            recorder.uses[key] = {use: next(iter(recorder.uses[id(leader.parameter)].values()))}

    hooks = [
        layer.owner.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen(layer, args[0] if args else kwargs["input"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
