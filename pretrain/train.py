"""The loop of general distillation: where stream, objective and engine meet."""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import checkpoint
from pretrain.encoder import build_student, check_trace, load_teacher, trace
from pretrain.engine import Engine, Ranks, machine
from pretrain.export import export
from pretrain.monitor import Monitor, Window, say
from pretrain.objective import distil, weighted
from pretrain.plan import Plan
from shards.block import read_shard, written_whole
from shards.stream import Batch, Stream, held_out_batches, micro_rows

HELD_OUT_ROWS = 256  # the first held-out rows, on which the objective is looked at
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Run:
    """One process of a run.  Every method is called by all ranks alike."""

    def __init__(self, plan: Plan, ranks: Ranks):
        self.plan, self.ranks, self.recipe = plan, ranks, plan.recipe
        self.out = Path(plan.options.out)
        self.most = plan.engine["train_micro_batch_size_per_gpu"]  # the most rows held at once
        self._together(self._open_shards)
        self._together(self._load)
        self._together(self._open_out)
        self.step = self._resume()
        self.monitor = Monitor(self.out, first=self.step, steps=self.recipe.steps) if ranks.rank == 0 else None

    def _together(self, work: Callable[[], None]) -> None:
        """Work that may fail on one rank: then all fail."""
        error = None
        try:
            work()
        except (ValueError, OSError) as caught:
            error = caught
        self.ranks.agree(error)

    def _load(self) -> None:
        """The teacher, and the students in their engines.  Copied layers come from the teacher's float32 weights."""
        plan, recipe = self.plan, self.recipe
        self.teacher = load_teacher(plan.options.teacher, torch.float32, self.ranks.device)
        self.teacher_is = _identity(self.teacher)
        self.engines = [self._engine(name) for name in plan.students]
        self.teacher.to(DTYPES[plan.teacher_dtype])
        check_trace(self.teacher)
        # A student's dropout: from (seed, rank), and from the checkpoint after a resume.
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{recipe.seed} dropout {self.ranks.rank}".encode()).digest()[:7], "big"))

    def _open_shards(self) -> None:
        plan, ranks, recipe = self.plan, self.ranks, self.recipe
        read = partial(read_shard, Path(plan.options.shards))
        self.stream = Stream(plan.manifest, read, seed=recipe.seed, batch=recipe.batch, lanes=recipe.lanes,
                             rank=ranks.rank, world=ranks.world, mask=recipe.mask)
        self.micro = micro_rows(len(self.stream.mine), self.most)
        self.held_out = held_out_batches(plan.manifest, read, most=HELD_OUT_ROWS, rank=ranks.rank, world=ranks.world,
                                         micro=self.micro, mask=recipe.mask)

    def _open_out(self) -> None:
        """With --fresh the old run is renamed first; nothing is deleted."""
        if self.ranks.rank == 0:
            if self.plan.options.fresh and self.out.exists():
                number = next(n for n in range(1, 10**6) if not self.out.with_name(f"{self.out.name}.{n}").exists())
                self.out.rename(self.out.with_name(f"{self.out.name}.{number}"))
                say(0, f"--fresh: the run that was in {self.out} is now {self.out}.{number}")
            self.out.mkdir(parents=True, exist_ok=True)

    def _engine(self, name: str) -> Engine:
        shape, init = self.plan.students[name], self.plan.inits[name]
        student = build_student(name, shape, self.teacher, self.plan.layers[name], init=init, seed=self.recipe.seed,
                                dropout=self.recipe.dropout)
        parameters = sum(p.numel() for p in student.encoder.parameters())
        say(self.ranks.rank, f"student {name}: {shape.layers} layers of {shape.hidden}, {parameters / 1e6:.1f} M parameters, "
            f"init={init}, like teacher layers {self.plan.layers[name]}")
        return Engine(name, student, self.recipe, self.plan.engine, self.micro)

    def about(self) -> dict:
        """What must not change between a run and its resume, and what a checkpoint's files depend on."""
        sums = "".join(shard.sha256 for shard in self.plan.manifest.shards)
        return {"recipe": json.loads(json.dumps(asdict(self.recipe))),
                "students": {name: asdict(shape) for name, shape in self.plan.students.items()},
                "shards": hashlib.sha256(sums.encode()).hexdigest(),
                "teacher": self.teacher_is,
                "machine": machine(self.plan.engine, self.ranks.world)}

    def _resume(self) -> int:
        """The step to go on from: the newest good checkpoint's, or 0."""
        found = checkpoint.newest_good(self.out / "checkpoints", self.ranks)
        if found is None:
            return 0
        tag, facts, faults = found
        for fault in faults:
            say(self.ranks.rank, f"passed over: {fault}")
        checkpoint.check_same(facts, self.about(), tag)
        if facts["step"] > self.recipe.steps:
            raise ValueError(f"{tag} is {facts['step']} steps old already; write steps={facts['step']} or more, or --fresh")
        checkpoint.load(tag, self.engines, self.ranks)
        say(self.ranks.rank, f"goes on from {tag} (row {facts['rows']:,})")
        return facts["step"]

    def finish(self) -> None:
        """Train to the last step, then export every student."""
        self._say_plan()
        if self.step == self.recipe.steps:
            say(self.ranks.rank, f"all {self.step} steps are done; for more write steps=N, to begin anew --fresh")
        else:
            self._train()
        self._export()
        if self.monitor:
            self.monitor.close()

    def _say_plan(self) -> None:
        recipe, manifest, plan = self.recipe, self.plan.manifest, self.plan
        accumulation = len(self.stream.mine) // self.micro
        say(self.ranks.rank, f"device {self.ranks.device.type}, {self.ranks.world} ranks, engine {plan.engine_file}, teacher in "
            f"{plan.teacher_dtype}; batch {recipe.batch} = {self.micro} rows x {accumulation} micro batches x "
            f"{self.ranks.world} ranks, {recipe.lanes} lanes, masks {recipe.mask}\n{recipe.steps:,} steps = "
            f"{recipe.steps * recipe.batch / manifest.rows:.2f} passes over {manifest.rows:,} rows; "
            f"tensorboard --logdir {self.out}")
        if self.monitor:
            facts = {"settings": asdict(recipe), "students": {n: asdict(s) for n, s in plan.students.items()},
                     "init": plan.inits, "layers": plan.layers, "options": vars(plan.options), "engine": plan.engine,
                     "teacher_dtype": plan.teacher_dtype, "ranks": self.ranks.world, "device": str(self.ranks.device),
                     "command": sys.argv, "python": platform.python_version(),
                     "versions": {p: version(p) for p in ("torch", "deepspeed", "transformers", "numpy")}}
            text = json.dumps(facts, indent=1)
            with written_whole(self.out / "run.json") as file:
                file.write(text.encode())
            self.monitor.text("run.json", "    " + text.replace("\n", "\n    "))

    def _train(self) -> None:
        """Read ahead by one thread, step, and log, look at held-out rows and save when due."""
        recipe = self.recipe
        window = Window(self.ranks)
        if self.step == 0:
            self._log({"rows": 0, **self._look_at_held_out()})
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as ahead:
            coming = ahead.submit(self._read, self.step)
            while self.step < recipe.steps:
                batches = self._batches(coming, window)
                if self.step + 1 < recipe.steps:
                    coming = ahead.submit(self._read, self.step + 1)
                self._update(batches, window)
                self.step += 1
                figures = {}
                if self._due(recipe.log_every):
                    figures, window = self._figures(window), Window(self.ranks)
                pause = time.perf_counter()
                if self._due(recipe.eval_every):
                    figures |= {"rows": self.step * recipe.batch, **self._look_at_held_out()}
                self._log(figures)
                if self._due(recipe.save_every):
                    checkpoint.save(self.out / "checkpoints", self.engines, self.ranks, step=self.step,
                                    rows=self.step * recipe.batch, about=self.about())
                window.begin += time.perf_counter() - pause  # rates are those of training alone

    def _due(self, every: int) -> bool:
        return self.step == self.recipe.steps or self.step % every == 0

    def _batches(self, coming: Future, window: Window) -> list[Batch]:
        """What the thread read; a shard that one rank cannot read ends the run on all ranks."""
        begin, error, batches = time.perf_counter(), None, []
        try:
            batches = coming.result()
        except ValueError as caught:
            error = caught
        window.waited += time.perf_counter() - begin
        self.ranks.agree(error)
        return batches

    def _read(self, step: int) -> list[Batch]:
        return self.stream.batches(step * self.recipe.batch, self.most)

    def _terms(self, batch: Batch) -> Iterator[tuple[Engine, dict[str, Tensor]]]:
        """One teacher pass, every student in turn: each one's loss terms by row."""
        ids, segments, real = (torch.from_numpy(x).to(self.ranks.device, non_blocking=True)
                               for x in (batch.ids, batch.segments, batch.real))
        mask = None if batch.real.all() else real
        with torch.no_grad():
            teacher = trace(self.teacher, ids, segments, mask)
        for engine in self.engines:
            yield engine, distil(engine(ids, segments, mask), teacher, real, self.plan.layers[engine.name])

    def _update(self, batches: list[Batch], window: Window) -> None:
        for batch in batches:
            for engine, terms in self._terms(batch):
                loss = weighted(terms, self.recipe.weights).mean()
                engine.update(loss, self.step)
                window.add(engine.name, terms, loss, len(batches))
            window.rows += len(batch.ids)
            window.tokens += batch.tokens
        window.steps += 1

    def _figures(self, window: Window) -> dict[str, float]:
        """Means over the steps since the last logged one, and rates over all ranks.  A non-finite loss ends the run."""
        figures = {"rows": self.step * self.recipe.batch, **window.means(self._name), "lr": self.recipe.rate(self.step - 1)}
        for engine in self.engines:
            figures[self._name(engine.name, "grad_norm")] = engine.gradient_norm()
            loss = figures[self._name(engine.name, "loss")]
            if not loss < float("inf"):
                saved = checkpoint.newest_good(self.out / "checkpoints", self.ranks)
                raise ValueError(f"student {engine.name}: the loss is {loss} before step {self.step}; last good checkpoint: "
                                 f"{saved[0] if saved else 'none'}. A smaller lr= or clip=, or bf16, may help")
        return figures

    def _name(self, student: str, figure: str) -> str:
        """With one student the figures have plain names; with several the student's stands before them."""
        return figure if len(self.engines) == 1 else f"{student}/{figure}"

    def _log(self, figures: dict[str, float]) -> None:
        if self.monitor:
            if figures:
                self.monitor.log(self.step, figures)
            self.monitor.advance(self.step)

    @torch.no_grad()
    def _look_at_held_out(self) -> dict[str, float]:
        """The objective on the first held-out rows, each row counted once over all ranks."""
        if not self.plan.manifest.held_out:
            return {}
        for engine in self.engines:
            engine.module.eval()
        names = self._term_names()
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        for batch in self.held_out:
            values = [v for _, terms in self._terms(batch) for v in (*terms.values(), weighted(terms, self.recipe.weights))]
            sums[:-1] += torch.stack([v.double().sum() for v in values]).cpu()
            sums[-1] += len(batch.ids)
        for engine in self.engines:
            engine.module.train()
        sums = self._sum_over_ranks(sums)
        return {f"held_out/{name}": (value / sums[-1]).item() for name, value in zip(names, sums[:-1], strict=True)}

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        sums = sums.to(self.ranks.device)
        dist.all_reduce(sums)
        return sums.cpu()

    def _term_names(self) -> list[str]:
        return [self._name(name, term) for name, layers in self.plan.layers.items()
                for term in ("embedding", *(f"hidden/{m + 1}" for m in range(len(layers))),
                             *(f"attention/{m + 1}" for m in range(len(layers))), "loss")]

    def _export(self) -> None:
        for engine in self.engines:
            weights = engine.weights()
            if self.ranks.rank == 0:
                folder = self.out / "students" / engine.name
                export(folder, engine.module, weights, self.plan.tokenizer)
                say(0, f"student {engine.name} is in {folder}")
        dist.barrier()


def _identity(teacher: torch.nn.Module) -> str:
    """Tells teachers apart by some of their float32 weights, wherever they lie."""
    sha256 = hashlib.sha256()
    for parameter in teacher.parameters():
        sha256.update(parameter.detach().flatten()[:1024].cpu().numpy().tobytes())
    return sha256.hexdigest()
