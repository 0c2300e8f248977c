"""The loop of general distillation: where stream, objective and engine meet."""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.profiler import profile, schedule, tensorboard_trace_handler
from torch.utils.flop_counter import FlopCounterMode

from pretrain import checkpoint
from pretrain.encoder import BETWEEN, load_teacher, trace
from pretrain.engine import Engine, machine, to_universal
from pretrain.general import PREEMPTED, StopRequest
from pretrain.monitor import Monitor, Window, attention, matrix_rate, similarity
from pretrain.objective import distil, weighted
from pretrain.plan import Plan
from pretrain.ranks import Ranks
from pretrain.student import build_student, export
from shards.block import read_shard
from shards.stream import Batch, DynamicMasks, Stream, micro_rows

HELD_OUT_ROWS = 256  # the first held-out rows, on which the objective is looked at
PROJECTED_TOKENS = 2**14  # on which a student's first weights are fitted; the trace of BERT-base then takes 2.5 GB
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Run:
    """One process of a run.  Every method is called by all ranks alike."""

    def __init__(self, plan: Plan, ranks: Ranks, stop: StopRequest):
        self.plan, self.ranks, self.recipe, self.stop = plan, ranks, plan.recipe, stop
        self.out, recipe = Path(plan.options.out), plan.recipe
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's buckets, which are GBs, at each step
        ranks.together(self._open_inputs)
        mark = ranks.first(self._open_out)
        ranks.agree(None if mark.exists() else ValueError(
            f"--out {self.out} is another folder on host {os.uname().nodename} than for rank 0; write one that all hosts share"))
        ranks.first(mark.rmdir)
        self.row_losses = {}  # of the last update: engine -> the losses of this rank's rows, micro batch by micro batch
        self._resume()
        self.rate, self.operations = matrix_rate(self.teacher.dtype, ranks.device), None  # of a token, in seconds at that rate
        passes = (f"{steps:,} steps = {steps * recipe.batch / manifest.rows:.2f} passes over {manifest.rows:,} rows"
                  for steps, manifest in zip(plan.steps, plan.manifests.values(), strict=True))
        ranks.say(f"device {ranks.device.type}, {ranks.world} ranks, engine {plan.engine_file}, teacher in {plan.teacher_dtype}; "
                  f"batch {recipe.batch} = {self.micro} rows x {recipe.batch // ranks.world // self.micro} micro batches x "
                  f"{ranks.world} ranks, masks {recipe.mask}\n{', then '.join(passes)}; tensorboard --logdir {self.out}")
        versions = {package: version(package) for package in ("torch", "deepspeed", "transformers", "numpy")}
        about = {**self.about, "options": vars(plan.options), "init": plan.inits, "layers": plan.layers, "engine": plan.engine,
                 "command": sys.argv, "teacher_dtype": plan.teacher_dtype, "versions": versions}
        self.monitor = Monitor(self.out, first=self.step, steps=recipe.steps, about=about) if ranks.rank == 0 else None

    def _open_inputs(self) -> None:
        """The teacher is in float32, from which copied layers come, until the students are made."""
        plan, ranks, recipe, self.phases = self.plan, self.ranks, self.recipe, []
        words = bool(recipe.mlm or recipe.soft_mlm)
        for first, (folder, manifest) in zip(accumulate(plan.steps[:-1], initial=0), plan.manifests.items(), strict=True):
            mask = DynamicMasks(folder, manifest, recipe.seed) if recipe.mask == "dynamic" else recipe.mask
            stream = Stream(manifest, partial(read_shard, folder), seed=recipe.seed, batch=recipe.batch, lanes=recipe.lanes,
                            rank=ranks.rank, world=ranks.world, mask=mask, words=words, padded=recipe.normalize != "row")
            self.micro = micro_rows(len(stream.mine), plan.engine["train_micro_batch_size_per_gpu"])
            self.phases.append((first, stream, stream.held_out(HELD_OUT_ROWS, self.micro)))
        self.teacher = load_teacher(plan.options.teacher, torch.float32, ranks.device, head=bool(recipe.soft_mlm))

    def _open_out(self) -> Path:
        """With --fresh the old run is renamed first; nothing is deleted -> a new folder there, for all to see."""
        if self.plan.options.fresh and self.out.exists():
            number = next(n for n in range(1, 10**6) if not self.out.with_name(f"{self.out.name}.{n}").exists())
            self.out.rename(self.out.with_name(f"{self.out.name}.{number}"))
            self.ranks.say(f"--fresh: the run that was in {self.out} is now {self.out}.{number}")
        self.out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".mark-", dir=self.out))

    def _resume(self) -> None:
        """The students as they were in the newest good checkpoint, `saved`, or at step 0; bit-exact on the same machine.  Shards
        are known by their sums, teachers by some of their float32 weights, wherever they lie."""
        plan, sums = self.plan, "".join(shard.sha256 for one in self.plan.manifests.values() for shard in one.shards)
        some = b"".join(p.detach().flatten()[:1024].cpu().numpy().tobytes() for p in self.teacher.parameters())
        settings = {**vars(self.recipe), "students": {name: vars(shape) for name, shape in plan.students.items()},
                    "shards": hashlib.sha256(sums.encode()).hexdigest(), "teacher": hashlib.sha256(some).hexdigest(),
                    **({"steps_before": plan.steps[:-1]} if plan.steps[1:] else {})}
        self.about = {"settings": settings, "machine": machine(plan.engine, self.ranks)}
        found = self.ranks.first(partial(checkpoint.newest_good, self.out / "checkpoints", self.about))
        self.saved, self.step, notes, universal = found or (None, 0, [f"begins in {self.out}"], False)
        self.ranks.say("\n".join(notes))
        source = self.ranks.first(partial(to_universal, self.saved, list(plan.students))) if universal else self.saved
        self.ranks.together(partial(self._load_students, source, universal))
        if universal:
            self.ranks.first(partial(shutil.rmtree, source))

    def _load_students(self, source: Path | None, universal: bool) -> None:
        self.engines = []
        for name, shape in self.plan.students.items():
            layers, init = self.plan.layers[name], self.plan.inits[name]
            fresh, first = "random" if source else init, self.phases[0][1]
            rows = first.some(PROJECTED_TOKENS // first.manifest.row_length) if fresh == "projected" else None
            student = build_student(name, shape, self.teacher, layers, fresh, self.recipe, rows and self._tensors(rows)[:3])
            self.ranks.say(f"student {name}: {student.encoder.num_parameters() / 1e6:.1f} M parameters, {shape}, init={init}, "
                           f"like teacher layers {layers}" + ", () without a layer loss" * (() in layers))
            self.engines.append(Engine(name, student, self.recipe, self.plan.engine, self.micro, self.ranks,
                                       drawn_at=self.step, saved=source, universal=universal))
        self.teacher.to(DTYPES[self.plan.teacher_dtype])
        for model in (self.teacher, *(engine.module for engine in self.engines)) if self.recipe.compile else ():
            for _, module in filter(lambda named: named[0].endswith(BETWEEN), model.named_modules()):
                module.compile(dynamic=True)  # for rows of any length

    def finish(self) -> int:
        """Train to the last step, then export every student -> the exit code, PREEMPTED where it was asked to stop."""
        if self.step == self.recipe.steps:
            self.ranks.say(f"all {self.step} steps are done; for more write steps=N, to begin anew --fresh")
        else:
            self._train()
        if self.monitor:
            self.monitor.bar.close()
            self.monitor.board.close()
        if self.step < self.recipe.steps:
            self.ranks.say(f"stopped after step {self.step} ({self.saved}); the same command goes on (exit code {PREEMPTED})")
            return PREEMPTED
        for engine in self.engines:
            folder = self.out / "students" / engine.name
            self.ranks.first(partial(export, folder, engine.module, engine.weights(), self.plan.tokenizer))
            self.ranks.say(f"student {engine.name} is in {folder}")
        return 0

    def _train(self) -> None:
        """Read ahead by one thread, step, and log, look at held-out rows and save when due, until done or stopped."""
        recipe, window, folder = self.recipe, Window(), self.out / "checkpoints"
        begin, end = map(int, (recipe.profile or "0:1").split(":"))
        wait = begin - 1 - self.step  # one step warms the profiler up
        due = schedule(wait=wait if self.monitor and wait >= 0 else 2**31, warmup=1, active=end - begin, repeat=1)
        traced = profile(schedule=due, on_trace_ready=tensorboard_trace_handler(str(self.out / "tensorboard")))
        with traced, ThreadPoolExecutor(1, thread_name_prefix="stream") as ahead:
            batches, stop = self._agree(ahead.submit(self._read, self.step), window)
            if self.step == 0 and not stop:
                self._log({"rows": 0, **self._look_at_held_out()})
            while self.step < recipe.steps and not stop:
                coming = ahead.submit(self._read, self.step + 1)
                self._update(batches, window)
                self.step += 1
                traced.step()
                batches, stop = self._agree(coming, window)
                save = stop or self._due(recipe.save_every)
                figures = {}
                if save or self._due(recipe.log_every):  # at a save too: the figures of a resumed run begin there
                    figures, window = self._figures(window), Window()
                pause = time.perf_counter()
                if self._due(recipe.eval_every):
                    figures |= {"rows": self.step * recipe.batch, **self._look_at_held_out()}
                self._log(figures)
                if save:
                    self.saved = checkpoint.save(folder, self.engines, self.ranks, self.step, self.about, self.saved)
                window.begin += time.perf_counter() - pause  # rates are those of training alone

    def _log(self, figures: dict[str, float]) -> None:
        if self.monitor:
            self.monitor.log(self.step, figures)

    def _due(self, every: int) -> bool:
        return self.step == self.recipe.steps or self.step % every == 0

    def _phase(self, step: int) -> tuple[int, Stream, list[Batch]]:
        """The first step, stream and held-out rows of the --shards that a step reads."""
        return next(phase for phase in reversed(self.phases) if phase[0] <= step)

    def _read(self, step: int) -> list[Batch]:
        first, stream, _ = self._phase(step)
        return stream.batches((step - first) * self.recipe.batch, self.micro) if step < self.recipe.steps else []

    def _agree(self, coming: Future, window: Window) -> tuple[list[Batch], bool]:
        """The next step's rows, and whether any rank was asked to stop; what went wrong on one rank ends the run on all."""
        begin, error, batches = time.perf_counter(), self._trouble(), []
        try:
            batches = coming.result()
        except ValueError as caught:
            error = error or caught
        window.waited += time.perf_counter() - begin
        return batches, self.ranks.agree(error, self.stop.asked())

    def _trouble(self) -> ValueError | None:
        """What was wrong with this rank's share of the last update, and with which rows."""
        for engine, losses in self.row_losses.items():
            wrong, blamed = engine.trouble(), self.row_numbers
            if not torch.cat(losses).sum().isfinite():
                wrong, blamed = "the loss is not finite", blamed[~torch.cat(losses).isfinite().cpu().numpy()]
            if wrong:
                stream = self._phase(self.step - 1)[1]
                shards = np.searchsorted(stream.first_row, blamed, side="right") - 1
                pairs = zip(shards, blamed - stream.first_row[shards], strict=True)
                places = [f"{stream.shards[shard].name.removesuffix('.tar')}:{row}" for shard, row in pairs]
                return ValueError(f"student {engine.name}: {wrong} in step {self.step}; rows {', '.join(places[:8])} (python -m "
                                  f"shards.look --row shows one); last good checkpoint: {self.saved}. Try a smaller lr= or clip=")
        return None

    def _tensors(self, batch: Batch) -> list[torch.Tensor]:
        given = batch.ids, batch.segments, batch.real, batch.words
        return [x if x is None else torch.from_numpy(x).to(self.ranks.device, non_blocking=True) for x in given]

    def _losses(self, batch: Batch, window: Window, held_out: Sequence[Batch] = ()) -> Iterator[tuple[Engine, torch.Tensor]]:
        """One teacher pass, every student in turn: each one's loss by row.  It and all terms are added to the window."""
        ids, segments, real, words = self._tensors(batch)
        mask, recipe = None if batch.real.all() else real, self.recipe
        kinds = [*recipe.weights] + ["cosine"] * bool(held_out and not recipe.cosine)
        with torch.no_grad():
            teacher = trace(self.teacher, ids, segments, mask, words if recipe.soft_mlm else None)
        window.lap("teacher")
        for engine in self.engines:
            layers, student = self.plan.layers[engine.name], engine(ids, segments, mask, words)
            if held_out and self.monitor and batch is held_out[0]:
                self.monitor.show(self.step, {self._named(engine, "attention"): attention(student, teacher, real, layers),
                                              self._named(engine, "similarity"): similarity(student, teacher, real)})
            terms = distil(student, teacher, real, layers, kinds, relation_heads=recipe.relation_heads,
                           padded=recipe.normalize == "padded", temperature=recipe.temperature, words=words)
            del student  # what the backward pass does not need may go
            losses = weighted(terms, self.plan.weights[engine.name], recipe.layer_weights == "balanced")
            window.add({self._named(engine, name): value for name, value in {**terms, "loss": losses}.items()})
            yield engine, losses
        window.rows += len(batch.ids)
        window.tokens += int(batch.real.sum())

    def _update(self, batches: list[Batch], window: Window) -> None:
        self.row_numbers = np.concatenate([batch.numbers for batch in batches])
        self.row_losses = {engine: [] for engine in self.engines}
        counter = nullcontext() if self.operations else FlopCounterMode(display=False)
        window.lap("")
        with counter:
            for batch in batches:
                for engine, losses in self._losses(batch, window):
                    self.row_losses[engine].append(losses.detach())
                    engine.update(losses.mean(), self.step, window.lap)
        if not self.operations:
            self.operations = counter.get_total_flops() / window.tokens / self.rate

    def _figures(self, window: Window) -> dict[str, float]:
        norms = {self._named(engine, "grad_norm"): engine.gradient_norm() for engine in self.engines}
        return {"rows": self.step * self.recipe.batch, "lr": self.recipe.rate(self.step - 1), **norms,
                **window.means(self.ranks), **window.rates(self.ranks, self.operations)}

    def _named(self, engine: Engine, figure: str) -> str:
        """With one student figures have plain names; with several the student's stands before them."""
        return figure if len(self.engines) == 1 else f"{engine.name}/{figure}"

    @torch.no_grad()
    def _look_at_held_out(self) -> dict[str, float]:
        """The objective on the first held-out rows, each row counted once over all ranks."""
        seen = Window()
        for engine in self.engines:
            engine.module.eval()
        for batch in (held_out := self._phase(max(0, self.step - 1))[2]):
            list(self._losses(batch, seen, held_out))
        for engine in self.engines:
            engine.module.train()
        return {f"held_out/{name}": mean for name, mean in seen.means(self.ranks).items()}
