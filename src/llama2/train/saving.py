"""Saving and resuming of runs: checkpoints, models, uploads; and the signals that end it.

All ranks go through the same calls; rank 0 alone writes.
"""

import array
import hashlib
import json
import random
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from llama2 import files, lora, schema
from llama2.checkpoint import pickles
from llama2.checkpoint.peft import save_adapter
from llama2.checkpoint.save import write_safetensors
from llama2.errors import CheckpointError, InputError
from llama2.lazy import door
from llama2.pretrained import PreTrainedModel
from llama2.protocols import CausalLM, TokenizerLike
from llama2.train import checkpoint_state, checkpoints, trees
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import Callbacks, TrainerControl, TrainerState, read_stored
from llama2.train.distributed import Ranks, Root, gathered, local
from llama2.train.optim import AdamW
from llama2.train.results import CARD, Results

LOG, STATE, OUTSIDE = "log.jsonl", "trainer_state.json", "optimizer_state"
_OLD_OUTSIDE = "optimizer.pt"  # of earlier versions
_RUN: schema.Schema = {
    **dict.fromkeys(("rows", "batch", "steps"), schema.whole(1, 2**62)),
    "seed": schema.whole(0, 2**63 - 1),
    "content": schema.text(),
    **dict.fromkeys(("adapter", "objective"), schema.table(schema.ANY, 1000)),
}
_upload = door("checkpoint.hub", "upload", "Uploads a folder to the hub.")
_create = door("checkpoint.hub", "create", "Makes a repository of the hub, where there is none.")


class Saving(Results):
    """The part of a trainer that writes and reads."""

    model: CausalLM
    network: Any
    args: TrainingArguments
    ranks: Ranks
    rows: Sequence[Any]
    state: TrainerState
    control: TrainerControl
    callbacks: Callbacks
    updates: AdamW
    folder: Path
    scale: float
    place: int
    processing_class: TokenizerLike
    lr_scheduler: Any
    _root: Root | None
    _narrow: torch.dtype | None
    _outside: bool
    _save_model: Callable[[Path], Any] | None
    _stop: bool
    run: str = ""  # which run's checkpoints are this one's

    # -- how long ------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows of one step, of all ranks together."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        raise NotImplementedError

    def _call(self, event: str, **given: object) -> None:
        raise NotImplementedError

    def _check_folder(self) -> None:
        """Raises InputError where nothing could be written, before anything is trained."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(f"output_dir {str(self.folder)!r} cannot be written ({error}); give another") from error

    # -- models --------------------------------------------------------------------------------------------------

    def gathered(self, every: bool = True) -> AbstractContextManager[None]:
        """Within it rank 0's model is whole, to be written: with all its weights, or with those that are trained.

        All ranks enter, where weights are sharded."""
        return gathered(self._root, self.ranks, every, self._narrow)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, or its adapter, and the tokenizer to output_dir, or to that of the arguments.

        With push_to_hub in the arguments a call of yours uploads them too.
        """
        folder, adapted = Path(output_dir or self.args.output_dir), bool(lora.names(self.network))
        with self.gathered(every=not adapted):
            if self.ranks.first:
                with files.saving(folder) as save:
                    self._write_model(save.stage, adapted)
        self.ranks.wait()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write_model(self, folder: Path, adapted: bool) -> None:
        if hasattr(self.model, "get_base_model"):
            self.model.save_pretrained(folder)
        elif adapted:
            save_adapter(self.network, folder)
        elif hasattr(self.network, "save_pretrained"):
            self.network.save_pretrained(folder, safe_serialization=self.args.save_safetensors)
        else:
            with files.replacing(folder / "model.safetensors") as file:
                write_safetensors(file, self.network.state_dict())
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # -- the hub -------------------------------------------------------------------------------------------------

    @property
    def hub_model_id(self) -> str:
        """The repository that push_to_hub writes to."""
        return str(self.args.hub_model_id or Path(self.args.output_dir).name)

    def _check_hub(self) -> None:
        """Makes the repository, before anything is trained for it."""
        if self.args.push_to_hub:
            args = self.args
            self.ranks.broadcast(
                lambda: _create(self.hub_model_id, token=args.hub_token, private=args.hub_private_repo)
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Uploads the model, or its adapter, the tokenizer and a model card to hub_model_id; returns the address of
        the commit. The other keywords are the card's: see `create_model_card`.
        """
        if not blocking:
            warnings.warn("push_to_hub: blocking=False has no effect: uploads are waited for", stacklevel=2)
        self._call("on_push_begin")
        address = None
        self.create_model_card(**kwargs)
        with tempfile.TemporaryDirectory() as name:
            self.save_model(name, _internal_call=True)
            if self.ranks.first:
                files.copy(Path(self.args.output_dir) / CARD, Path(name) / CARD)
                address = self._pushed(Path(name), commit_message or "End of training", token, revision, private)
        self.ranks.wait()
        return address

    def _pushed(self, folder: Path, message: str, token: str | None, revision: str | None, private: bool | None) -> str:
        args = self.args
        return str(
            _upload(
                folder,
                self.hub_model_id,
                token=args.hub_token if token is None else token,
                private=args.hub_private_repo if private is None else private,
                commit_message=message,
                revision=args.hub_revision if revision is None else revision,
            )
        )

    def _push_checkpoint(self, place: Path) -> None:
        """After a checkpoint: the model, for "checkpoint" and "all_checkpoints" also what goes on from it."""
        if not self.args.push_to_hub or self.args.hub_strategy == "end":
            return
        message = f"Training in progress, step {self.state.global_step}"
        self.push_to_hub(commit_message=message)
        kept = {"checkpoint": "last-checkpoint", "all_checkpoints": place.name}.get(self.args.hub_strategy)
        if kept is not None and self.ranks.first:
            with tempfile.TemporaryDirectory() as name:
                (Path(name) / kept).symlink_to(place.resolve(), target_is_directory=True)
                self._pushed(Path(name), message, None, None, None)

    # -- signals -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the run after the step that is running, with a checkpoint. Asked twice, it ends at once and without."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One run at a time writes into a folder: rank 0 has its lock."""
        with ExitStack() as stack:
            self.ranks.broadcast(lambda: stack.enter_context(files.locked(self.folder)))
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup asks for
            ends.append(signal.SIGHUP)
        before = {s: signal.signal(s, lambda *_: self.stop()) for s in ends}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of this step and removes the oldest beyond save_total_limit."""
        step, ranks = self.state.global_step, self.ranks
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = str(self.folder / f"checkpoint-{self.state.best_global_step}")
        with ExitStack() as stack:
            made = ranks.broadcast(lambda: stack.enter_context(checkpoints.writing(self.folder, step, self.run)))
            checkpoint_state.write(made, self.updates, ranks, state=not self.args.save_only_model)
            if ranks.first:
                self._write_state(made)
            if self._save_model is None:
                self.save_model(str(made), _internal_call=True)
            else:
                with self.gathered(every=not lora.names(self.network)):
                    if ranks.first:
                        self._save_model(made)
            ranks.wait()
        self._prune()
        ranks.wait()
        place = self.folder / f"checkpoint-{step}"
        self._push_checkpoint(place)
        self._call("on_save")
        self.control.should_save = False
        return place

    def _prune(self) -> None:
        if self.args.save_total_limit and self.ranks.first:
            best = self.state.best_global_step
            spare = None if best is None else self.folder / f"checkpoint-{best}"
            checkpoints.prune(self.folder, self.args.save_total_limit, spare, self.run)

    def _write_state(self, made: Path) -> None:
        self.state.stateful_callbacks = {**self.callbacks.states(), "TrainerControl": self.control.state()}
        content = {**asdict(self.state), "run": self._identity(), "ranks": self.ranks.world, "scale": self.scale}
        content |= {"place": self.place, "plateau": self._plateau_state()}
        files.write_text(made / STATE, json.dumps(content, default=str) + "\n")
        if self._outside and not self.args.save_only_model:
            scheduler = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
            trees.write(made, OUTSIDE, {"optimizer": self.updates.inner.state_dict(), "scheduler": scheduler})

    def _plateau_state(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """Identifies a run: the settings that must agree to resume it, and its number of steps."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        found = {"rows": len(self.rows), "batch": self.batch, "seed": seed, "steps": self.steps}
        return {**found, "content": self._content, "adapter": _adapter(self.network), "objective": _settings(self)}

    @cached_property
    def _content(self) -> str:
        return digest(self.rows)

    def _resume(self, wanted: bool | str | None) -> None:
        wanted = wanted or self.ranks.restarts > 0
        place = self.ranks.broadcast(lambda: self._chosen(wanted))
        self.run = self.ranks.broadcast(checkpoints.new_run) if place is None else checkpoints.run_of(place)
        if place is None:
            if wanted and self.ranks.first and (self.folder / LOG).exists():
                files.write_text(self.folder / LOG, "")  # of steps without a checkpoint, which are taken again
            return
        if not place.is_dir():
            raise InputError(
                f"rank {self.ranks.rank} does not see {place}; output_dir must be a folder of all machines"
            )
        content = read_stored(place / STATE)
        schema.check(content.get("run", {"batch": None}), _RUN, place / STATE)
        if "batch" not in content.get("run", {}):
            raise CheckpointError(f"{place / STATE} does not say how many rows a step took (run, batch); it is damaged")
        self._keep_batch(content)
        self._check_identity(place, content["run"], ("rows", "batch", "seed", "content", "objective"))
        if not checkpoint_state.resumable(place):
            raise InputError(f"{place} was written with save_only_model, so nothing can go on from it; load its model")
        weights, moments = checkpoint_state.read(place, self.updates)
        self._check_identity(place, content["run"], ("adapter",))
        self._set(weights)
        self.scale = content.get("scale", 1.0)
        self.updates.load(moments)
        self.state = TrainerState.of(content)
        self.place = content.get("place", self.state.global_step)
        if self._outside:
            self._load_outside(place)
        self._load_plateau(content.get("plateau"))
        if self.args.restore_callback_states_from_checkpoint:
            self.callbacks.restore(self.state.stateful_callbacks)
        if self.ranks.first:
            # The checkpoint may be of another folder; without the steps that are taken again.
            files.write_text(self.folder / LOG, "".join(json.dumps(entry) + "\n" for entry in self.state.log_history))
        if wanted is True:
            self._prune()  # where the run ended between its last checkpoint and this, no other would follow

    def _load_plateau(self, content: dict[str, Any] | None) -> None:
        raise NotImplementedError

    def _load_outside(self, place: Path) -> None:
        if (place / f"{OUTSIDE}.json").exists():
            content = trees.read(place, OUTSIDE)
        elif (place / _OLD_OUTSIDE).exists():
            content = pickles.load(place / _OLD_OUTSIDE)
        else:
            raise InputError(
                f"{place} has no {OUTSIDE}.json: it is of a run without an optimiser of your own; leave it out"
            )
        if not isinstance(content, dict) or not content.keys() >= {"optimizer", "scheduler"}:
            raise CheckpointError(f"{place} holds no optimiser and scheduler of yours; it is damaged")
        try:
            self.updates.inner.load_state_dict(content["optimizer"])
            if content["scheduler"] is not None and self.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(content["scheduler"])
        except Exception as error:  # whatever a foreign optimiser makes of a state that is not its own
            raise CheckpointError(f"the optimiser does not take its state from {place}: {error!r}") from error

    def _check_identity(self, place: Path, there: dict[str, Any], names: Sequence[str]) -> None:
        """Raises InputError for a checkpoint of other rows, seeds or adapters. A run may become longer."""
        here = self._identity()
        told = [said for name in names if name in there for said in _differences(name, there[name], here[name])]
        if told:
            raise InputError(
                f"{place} is of another run: it differs in {', '.join(told)}; give the same data, batch size, seed, "
                "adapter and objective, or another output_dir"
            )

    def _chosen(self, wanted: bool | str) -> Path | None:
        """The checkpoint to go on from."""
        checkpoints.sweep(self.folder)
        if not wanted:
            return None
        place = checkpoints.newest(self.folder) if wanted is True else Path(wanted)
        if place is not None and wanted is not True and (wrong := checkpoints.problem(place)):
            raise InputError(f"{place} cannot be resumed from: {wrong}")
        return place

    def _keep_batch(self, content: dict[str, Any]) -> None:
        """On another number of ranks than before, as many batches per step as make the same rows per step."""
        before, wanted, args = content.get("ranks", 1), content["run"]["batch"], self.args
        if before == self.ranks.world or wanted == self.batch:
            return
        times, rest = divmod(wanted, args.per_device_train_batch_size * self.ranks.world)
        if rest:
            raise InputError(
                f"the run took {wanted} rows per step on {before} ranks, which {self.ranks.world} ranks of "
                f"{args.per_device_train_batch_size} rows do not divide; start another number of ranks, or set "
                f"per_device_train_batch_size so that it times {self.ranks.world} divides {wanted}"
            )
        args.gradient_accumulation_steps = times

    def _load_weights(self, place: Path) -> None:
        self._set(checkpoint_state.read(place, self.updates, state=False)[0])

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.updates.parameters.items():
            local(parameter).copy_(weights[name])


# -- what a run is made of ---------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of an epoch, which every step of it asks for."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(count), count))


def grouped(order: Sequence[int], lengths: Sequence[int], batch: int) -> list[int]:
    """An order in which rows of one batch are about equally long: runs of 50 batches sorted by length, the longest row
    of all first, so that memory runs out at once or never."""
    size = max(1, min(len(order) // (batch * 4) or 1, 50)) * batch
    runs = [sorted(order[i : i + size], key=lambda row: -lengths[row]) for i in range(0, len(order), size)]
    found = [row for run in runs for row in run]
    longest = max(range(len(found)), key=lambda place: lengths[found[place]])
    found[0], found[longest] = found[longest], found[0]
    return found


def digest(rows: Iterable[Any]) -> str:
    """A hash of what rows hold, the same in every process."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        _feed(found, row)
    return found.hexdigest()


def _feed(into: hashlib.blake2b, value: object) -> None:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        for name in sorted(value, key=str):
            _feed(into, name)
            _feed(into, value[name])
    elif isinstance(value, list | tuple):
        into.update(f"[{len(value)}".encode())
        if value and all(type(one) is int for one in value):
            into.update(array.array("q", value).tobytes())
        else:
            for one in value:
                _feed(into, one)
    else:
        into.update(
            repr(value).encode() if isinstance(value, str | int | float | None) else type(value).__name__.encode()
        )


def _adapter(model: PreTrainedModel) -> dict[str, Any]:
    """Describes the active adapters: ranks, scales, dropouts, and a hash of which module has which; {} without any."""
    found = [
        (path, name, len(layer.lora_A[name]), layer.scaling[name] * len(layer.lora_A[name]), layer.dropout[name])
        for path, layer in lora.layers(model).items()
        for name in layer.active
        if name in layer.lora_A
    ]
    if not found:
        return {}
    ranks, alphas, dropouts = (sorted({one[place] for one in found}) for place in (2, 3, 4))
    which = hashlib.blake2b(repr(sorted(found)).encode(), digest_size=8).hexdigest()
    return {"r": ranks, "lora_alpha": alphas, "lora_dropout": dropouts, "modules": which}


def _settings(trainer: Any) -> dict[str, Any]:
    """The numbers and names that an objective has for settings."""
    objective = trainer.objective
    held = {name: value for name, value in vars(objective).items() if not name.startswith("_")} if objective else {}
    plain = {name: value for name, value in held.items() if isinstance(value, str | int | float | bool)}
    return {"kind of training": type(objective).__name__, **plain} if objective else {}


def _differences(name: str, there: object, here: object) -> list[str]:
    """Lists the differences between a checkpoint and this run, in words."""
    if there == here or type(there) is not type(here):
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        shown = [key for key in keys if key != "modules"] or keys
        return [f"{key} ({_shown(there.get(key))}, not {_shown(here.get(key))})" for key in shown]
    return ["the rows"] if name == "content" else [f"{name} ({there}, not {here})"]


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
