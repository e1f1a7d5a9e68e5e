"""A run that can be killed: its folder, what it has finished, and whose it is."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file

from .config import HWPQConfig
from .errors import CheckpointError
from .shards import write, written

FINISHED = "hwpq_fx_run.json"
SAMPLE = 2**16  # bytes of a shard's beginning and end that count: reading all of it would take as long as the run


def fingerprint(
    files: Sequence[Path], batches: Sequence[Mapping[str, Any]] | None, config: HWPQConfig, device: torch.device
) -> dict[str, Any]:
    """What a run's bits depend on, as JSON: the model's files (sizes, headers, and the first and last bytes of the
    tensors), every token, the config, the versions."""
    software = {name: version(name) for name in ("hwpq_fx", "torch", "transformers", "safetensors")}
    data = None if batches is None else {str(number): _hash_of(batch) for number, batch in enumerate(batches)}
    found = {
        "model": {file.name: _hash_of_file(file) for file in files},
        "batches": data,
        "config": asdict(config),
        "software": software,
        "device": device.type,
    }
    return json.loads(json.dumps(found))


def _hash_of(batch: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def _hash_of_file(file: Path) -> str:
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little") if file.suffix == ".safetensors" else 0
        digest.update(opened.read(header + SAMPLE))
        opened.seek(max(0, file.stat().st_size - SAMPLE))
        digest.update(opened.read())
    return digest.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What two fingerprints differ in, in words."""
    found = []
    for name in dict.fromkeys([*then, *now]):
        one, other = then.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{within}{name}.")
        elif one != other:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (one, other))
            found.append(f"{within}{name}" + ("" if hashed or within == "" else f" ({one!r} then, {other!r} now)"))
    return found


class Run:
    """The folder of an unfinished run, `.NAME.unfinished` beside `out`, which becomes `out` in the end.

    Its shards are what the checkpoint will hold; `work/` holds the rest. No other process may work on `out` until
    `close()`. Raises FileExistsError where one does, or where `out` or an unfinished run is there and not to be
    resumed, CheckpointError where that run is another one, or damaged.
    """

    def __init__(self, out: Path, whose: dict[str, Any], resume: bool):
        self.out, self.folder, self.whose = out, out.with_name(f".{out.name}.unfinished"), whose
        self.work = self.folder / "work"
        self.finished: dict[str, Any] | None = None
        """What `finish` was given, where there is nothing left to do."""
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(out.with_name(f".{out.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(f"another process is at work on {out}: wait for it, or choose another") from error
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others work on `out`."""
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _begin(self, resume: bool) -> None:
        out = self.out
        if out.exists():
            if not (resume and (out / FINISHED).is_file()):
                raise FileExistsError(f"{out} is there already: choose another folder")
            self.finished = self._same(out / FINISHED)
            return
        note = self.work / FINISHED
        if (self.folder / FINISHED).exists() or note.exists():
            if not resume:
                raise FileExistsError(f"{self.folder} holds an unfinished run: resume it, or delete the folder")
            if (self.folder / FINISHED).exists():
                self.finished = self._same(self.folder / FINISHED)
                self._move()
                return
            self._same(note)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)  # killed before it had begun
            self.work.mkdir(parents=True)
            self._note(note, None)

    def _note(self, file: Path, result: dict[str, Any] | None) -> None:
        with written(file) as partial:
            partial.write_text(json.dumps({"fingerprint": self.whose, "result": result}))

    def _same(self, note: Path) -> dict[str, Any] | None:
        where = self.folder if note.is_relative_to(self.folder) else self.out
        try:
            told = json.loads(note.read_text())
            then, result = told["fingerprint"], told["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{note} is damaged ({error}): delete {where} and begin again") from error
        if changed := differences(then, self.whose):
            raise CheckpointError(
                f"{where} is of another run: different are {', '.join(changed[:8])}; resume with the same, or "
                "choose another folder"
            )
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Everything but `work/` is complete: make it `out`. `result`, JSON, stays with it."""
        self._note(self.folder / FINISHED, result)
        self._move()
        self.finished = result

    def _move(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.folder.rename(self.out)

    # ---- hidden states: those that block `index` is given, a file for each batch; and, where layers are converted in
    # order, one more with those of the converted blocks before it

    def hidden(self, index: int, batch: int, converted: bool = False) -> torch.Tensor:
        with safe_open(self._hidden(index, batch, converted), framework="pt") as file:
            return file.get_tensor("hidden")

    def write_hidden(self, index: int, batch: int, hidden: torch.Tensor, converted: bool = False) -> None:
        file = self._hidden(index, batch, converted)
        file.parent.mkdir(exist_ok=True)
        write({"hidden": hidden.cpu()}, file, {})

    def drop_hidden(self, before: int) -> None:
        """Those of blocks before `before` are used up."""
        for folder in self.work.glob("hidden-*"):
            if int(folder.name.removeprefix("hidden-")) < before:
                shutil.rmtree(folder)

    def _hidden(self, index: int, batch: int, converted: bool) -> Path:
        # before the first block nothing is converted
        kind = "-converted" if converted and index else ""
        return self.work / f"hidden-{index}" / f"{batch}{kind}.safetensors"

    # ---- tensors among the other arguments of a batch

    def write_arguments(self, batch: int, tensors: Sequence[torch.Tensor]) -> None:
        write({str(at): tensor.cpu() for at, tensor in enumerate(tensors)}, self._arguments(batch), {})

    def arguments(self, batch: int) -> list[torch.Tensor]:
        found = load_file(self._arguments(batch))
        return [found[str(at)] for at in range(len(found))]

    def _arguments(self, batch: int) -> Path:
        return self.work / f"arguments-{batch}.safetensors"
