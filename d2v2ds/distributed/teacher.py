"""`Teacher`: a module kept as an exponential moving average (EMA) of a DeepSpeed engine's weights, sharded like them.

Each rank averages the fp32 master weights it holds itself, in fp32, and nothing is communicated for it: the shards
of teacher and student line up one to one. The forward runs on a working copy in the engine's compute type:

    stage 0     the average itself (fp32)
    stages 1-2  whole on every rank; filled by one all-gather before the first forward after an update
    stage 3     partitioned by ZeRO-3, written shard by shard during the update; a forward gathers as usual, in the
                student's gather units

An average kept in bf16 instead would stand still: at decay 0.9997 a weight moves only when the student is some ten
times as large.

In another project, with `Network`, its DeepSpeed JSON `config`, `batches` and a `decay` of its own:

    import deepspeed, torch
    from d2v2ds.distributed.teacher import Teacher
    network = Network()
    engine, _, _, _ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    teacher = Teacher(Network(), engine)  # an exact copy of the engine's fp32 master weights
    for batch in batches:
        inputs = batch.to(engine.device, torch.bfloat16)  # what the engine computes in, for the teacher too
        target = teacher(inputs)  # eval mode, no gradient
        engine.backward((engine(inputs) - target).float().square().mean())
        engine.step()
        if engine.was_step_applied():  # not between accumulation boundaries, nor when DeepSpeed skipped the step
            teacher.update(decay)
    weights = teacher.full_state_dict()  # on rank 0, for Network().load_state_dict

A network that skips some of its blocks in some steps (layer drop) calls `optimizer_step` of `distributed/engine.py` in
place of `engine.step()`, and updates when its outcome is `applied`: at stage 3 DeepSpeed would give a skipped block the
gradient of an earlier step. At stage 0 it also skips a gradient that is not finite, which DeepSpeed applies.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.ds_config import teacher_ds_config
from d2v2ds.errors import CheckpointError

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 20}
"""Elements averaged at a time: the working copy is then written from a value that is still in the cache."""


@dataclass(frozen=True)
class _Span:
    """Neighbouring shards of the student's master, averaged as one."""

    master: Tensor
    """(n,) fp32, the student's."""
    start: int
    """Position of the span in the teacher's flat buffers."""
    is_copied: bool
    """True if an update copies it."""


class Teacher:
    """The EMA of a student engine, callable like the module it wraps."""

    def __init__(
        self,
        module: nn.Module,
        student: DeepSpeedEngine,
        *,
        will_be_restored: bool = False,
        is_copied: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Take over `module` and make it an exact copy of the student's fp32 master weights.

        Args:
            module: the teacher's network, whole, on the CPU. Every parameter and buffer name must exist in the
                student's module with the same shape; the student may have more. Weights tied in the student must be
                tied in it. Its values are never read.
            student: the engine to follow: fp32 at ZeRO stage 0, bf16 or fp32 at stages 1 to 3.
            will_be_restored: copy nothing, for a checkpoint is read before the first use.
            is_copied: True for the name of a parameter that an update copies from the student instead of averaging it.

        Raises:
            ValueError: for an engine that cannot be followed, saying why; listing every parameter without a partner
                of the same name and shape.
        """
        if faults := zero.unsupported(student):
            raise ValueError("Teacher: cannot follow this engine:\n" + "\n".join(faults))
        self.num_updates = 0
        """Calls of `update`: one for each applied optimizer step, fewer if the objective leaves some out, more if it
        asks for another (`again`)."""
        self._student = student
        self._stage = zero.stage(student)
        self._dtype = zero.compute_dtype(student)
        student_shards = zero.parameter_shards(student)
        _check_pairs(module, student.module, student_shards)
        self._shards = {name: student_shards[name] for name, _ in module.named_parameters()}
        self._copied = {name for name, shard in self._shards.items() if shard.trainable and is_copied(name)}
        self._lay_out()
        self._module, self._forward = self._place(module.requires_grad_(False).eval())
        self._adopt_working_copy()
        self._seen_step = -1
        self._is_stale = True
        if not will_be_restored:
            self.reset()

    @property
    def module(self) -> nn.Module:
        """The wrapped network. At stage 3 its parameters are empty outside of a forward."""
        return self._module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output in eval mode, without gradient. At stages 1 to 3 all ranks must call together.

        Floating inputs come in the type that the student's engine computes in (bf16 or fp32); nothing is converted.
        """
        if self._is_stale:
            self._refresh()
        return self._forward(*args, **kwargs)

    @torch.no_grad()
    def update(self, decay: float, *, again: bool = False) -> None:
        """Move towards the student: `ema = decay * ema + (1 - decay) * master`. Local, no collective call.

        Call it at most once after each applied optimizer step. Parameters with requires_grad=False are left alone;
        buffers, and parameters that `is_copied` names, are copied from the student.

        Args:
            decay: weight kept, 0 to 1. At exactly 1 the teacher is frozen and nothing is read or written.
            again: allow another update for the same optimizer step.

        Raises:
            ValueError: if the decay is outside [0, 1].
            RuntimeError: on a second call for the same optimizer step (an update for each micro-batch, say).
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay: expected a number from 0 to 1, found {decay}")
        if self._seen_step == self._student.global_steps and not again:
            raise RuntimeError(
                f"Teacher.update: called twice for optimizer step {self._seen_step}; call it once after each step, "
                "at the accumulation boundary"
            )
        self._seen_step = self._student.global_steps
        self.num_updates += 1
        if decay == 1.0:
            return
        self._check_master_in_place()
        for ema, master, working, is_copied in self._chunks:
            if is_copied:
                ema.copy_(master)
            else:
                ema.lerp_(master, 1.0 - decay)
            if working is not None:
                working.copy_(ema)
        self._copy_buffers()
        self._is_stale = True

    @torch.no_grad()
    def reset(self) -> None:
        """Make the teacher an exact copy of the student's master weights. Local."""
        for name, shard in self._shards.items():
            self._average[name].copy_(shard.data)
        self._copy_buffers()
        self._write_working_copy()

    @torch.no_grad()
    def student_distance(self) -> float:
        """Distance of student and teacher relative to the student, `|master - ema| / |master|`. One reduction."""
        difference = reference = torch.zeros((), dtype=torch.float64)
        for name, shard in self._shards.items():
            if shard.trainable and shard.numel:
                gap = torch.linalg.vector_norm(shard.data - self._average[name])
                difference = difference + gap.double().square().cpu()
                reference = reference + torch.linalg.vector_norm(shard.data).double().square().cpu()
        if self._stage > 0:
            sums = comm.all_reduce_sum([float(difference), float(reference)])
        else:
            sums = [float(difference), float(reference)]
        return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0

    def shards(self) -> dict[str, zero.Shard]:
        """This rank's fp32 averages, by parameter name; `data` is a view of the living average."""
        return {
            name: zero.Shard(
                name=name,
                shape=shard.shape,
                offset=shard.offset,
                numel=shard.numel,
                padded=self._average[name],
                trainable=shard.trainable,
                replicated=shard.replicated,
            )
            for name, shard in self._shards.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: enough to go on, to put whole parameters together, and to cut them anew.

        Returns:
            `num_updates`, `buffers` by name, and `shards`: for each parameter its full `shape`, the `offset` of
            this rank's elements in the flattened whole and a copy of them, `data` (numel,) fp32 on the CPU.
        """
        return {
            "num_updates": self.num_updates,
            "buffers": {name: buffer.to("cpu", copy=True) for name, buffer in self._module.named_buffers()},
            "shards": {
                name: {"shape": shard.shape, "offset": shard.offset, "data": shard.data.to("cpu", copy=True)}
                for name, shard in self.shards().items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this rank's `state_dict`.

        Raises:
            CheckpointError: listing the parameters whose shards do not line up with this engine's.
        """
        saved, own = state["shards"], self.shards()
        faults = [
            f"{name}: only in the {side}"
            for side, names in (("state", saved.keys() - own.keys()), ("teacher", own.keys() - saved.keys()))
            for name in sorted(names)
        ]
        for name in sorted(saved.keys() & own.keys()):
            expected = (own[name].shape, own[name].offset, own[name].numel)
            found = (tuple(saved[name]["shape"]), saved[name]["offset"], saved[name]["data"].numel())
            if expected != found:
                faults.append(f"{name}: expected (shape, offset, elements) {expected}, found {found}")
        if faults:
            raise CheckpointError(
                "teacher state does not fit (another model, ZeRO stage, rank or number of ranks?):\n"
                + "\n".join(faults[:20])
            )
        for name, shard in own.items():
            shard.data.copy_(saved[name]["data"])
        for name, buffer in self._module.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.after_restore(state["num_updates"])

    @torch.no_grad()
    def after_restore(self, num_updates: int) -> None:
        """Go on from averages that were written into the `data` of `shards()`. Local."""
        self.num_updates = num_updates
        self._seen_step = self._student.global_steps
        self._write_working_copy()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return a state dict for the network's `load_state_dict`, on rank 0's CPU; empty elsewhere.

        Every parameter's whole fp32 average, tied ones under each of their names, and every persistent buffer.
        Collective; one parameter at a time is whole on the other ranks.
        """
        averages = {name: zero.gather_shard(shard, shard.data) for name, shard in self.shards().items()}
        if comm.rank() > 0:
            return {}
        name_of = {id(param): name for name, param in self._module.named_parameters()}
        whole: dict[str, Tensor] = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            average = averages[name_of[id(value)]] if id(value) in name_of else value.detach().cpu().clone()
            if average is not None:
                whole[name] = average
        return whole

    # ---------------------------------------------------------------- layout

    def _lay_out(self) -> None:
        """Put the shards into one flat buffer, in the order of the student's memory, so that neighbours stay so."""
        device = next(iter(self._shards.values())).padded.device
        frozen = [shard for shard in self._shards.values() if not shard.trainable]
        trained = sorted((s for s in self._shards.values() if s.trainable), key=lambda s: s.padded.data_ptr())
        starts: dict[str, int] = {}
        spans: list[_Span] = []
        total, end = 0, -1
        for shard in trained:
            padded, is_copied = shard.padded, shard.name in self._copied
            starts[shard.name] = total
            if spans and padded.data_ptr() == end and spans[-1].is_copied == is_copied:
                before = spans[-1].master
                whole = before.as_strided((before.numel() + padded.numel(),), (1,))
                spans[-1] = _Span(whole, spans[-1].start, is_copied)
            elif padded.numel():
                spans.append(_Span(padded, total, is_copied))
            total += padded.numel()
            end = padded.data_ptr() + padded.numel() * padded.element_size()
        for shard in frozen:
            starts[shard.name] = total
            total += shard.padded.numel()
        self._ema = torch.zeros(total, dtype=torch.float32, device=device)
        self._spans = spans
        self._starts = starts
        self._addresses = zero.master_addresses(self._student)
        self._average = {n: self._ema.narrow(0, starts[n], s.numel) for n, s in self._shards.items()}

    def _place(self, module: nn.Module) -> tuple[nn.Module, Any]:
        """Bring the module to its device, type and partition; returns it and what runs its forward."""
        for param in module.parameters():
            param.data = torch.empty_like(param.data, dtype=self._dtype)  # the first update or copy writes them all
        if self._stage < 3:
            module.to(comm.device())
            return module, module
        zero.adopt_gather_units(module, self._student)
        engine, _, _, _ = deepspeed.initialize(model=module, config=teacher_ds_config(self._student.config))
        return engine.module, engine

    def _adopt_working_copy(self) -> None:
        """Make one flat buffer the storage of the module's local weights, and cut the work into chunks."""
        on_device = self._ema.device == comm.device()
        if self._dtype == torch.float32 and on_device:
            self._working = self._ema
        else:
            self._working = torch.zeros(self._ema.numel(), dtype=self._dtype, device=comm.device())
        params: dict[str, Any] = dict(self._module.named_parameters())
        for name, shard in self._shards.items():
            weights = self._working.narrow(0, self._starts[name], shard.padded.numel())
            if self._stage == 3:
                params[name].ds_tensor.data = weights
            elif self._stage == 0:
                params[name].data = weights.view(shard.shape)
        own_layout = [(n, self._starts[n], s.offset, s.numel) for n, s in self._shards.items() if s.numel]
        self._layouts = comm.gather_objects(own_layout) if self._stage in (1, 2) else []
        self._lengths = comm.gather_objects(self._working.numel()) if self._stage in (1, 2) else []
        size = CHUNK_ELEMENTS[self._ema.device.type]
        separate = self._working is not self._ema
        self._chunks: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        for span in self._spans:
            length = span.master.numel()
            masters = torch.split(span.master, size)
            averages = torch.split(self._ema.narrow(0, span.start, length), size)
            copies: Iterable[Tensor | None] = [None] * len(masters)
            if separate:
                copies = torch.split(self._working.narrow(0, span.start, length), size)
            same = [span.is_copied] * len(masters)
            self._chunks += list(zip(averages, masters, copies, same, strict=True))

    # ---------------------------------------------------------------- working copy

    def _write_working_copy(self) -> None:
        if self._working is not self._ema:
            self._working.copy_(self._ema)
        self._is_stale = True

    def _refresh(self) -> None:
        """Bring the module's weights up to date with the working copy. Collective at stages 1 and 2."""
        if self._stage in (1, 2):
            self._gather_working_copy()
        self._is_stale = False

    def _gather_working_copy(self) -> None:
        """One all-gather of every rank's working copy, then each piece into its parameter."""
        longest = max(self._lengths)
        own = self._working.new_zeros(longest)
        own[: self._working.numel()] = self._working
        gathered = self._working.new_empty(longest * comm.world())
        torch_dist.all_gather_into_tensor(gathered, own)
        params = dict(self._module.named_parameters())
        for rank, layout in enumerate(self._layouts):
            for name, start, offset, numel in layout:
                piece = gathered.narrow(0, rank * longest + start, numel)
                params[name].data.view(-1).narrow(0, offset, numel).copy_(piece)

    def _copy_buffers(self) -> None:
        source = dict(self._student.module.named_buffers())
        for name, buffer in self._module.named_buffers():
            buffer.copy_(source[name])

    def _check_master_in_place(self) -> None:
        if zero.master_addresses(self._student) != self._addresses:
            raise RuntimeError(
                "Teacher.update: the student's master weights moved in memory (engine.offload_states?); "
                "build the teacher anew"
            )


def _check_pairs(module: nn.Module, student: nn.Module, shards: dict[str, zero.Shard]) -> None:
    """Raise unless every parameter and buffer of the teacher has a partner in the student."""
    faults = []
    for name, param in module.named_parameters():
        if name not in shards:
            faults.append(f"parameter {name}: not in the student")
        elif zero.full_shape(param) != shards[name].shape:
            faults.append(f"parameter {name}: student {shards[name].shape}, teacher {zero.full_shape(param)}")
    buffers = dict(student.named_buffers())
    for name, buffer in module.named_buffers():
        if name not in buffers or buffers[name].shape != buffer.shape:
            faults.append(f"buffer {name}: no such buffer of shape {tuple(buffer.shape)} in the student")
    if not shards or not any(True for _ in module.parameters()):
        faults.append("the teacher has no parameters")
    if faults:
        raise ValueError("Teacher: teacher and student do not pair up by name:\n" + "\n".join(faults[:20]))
