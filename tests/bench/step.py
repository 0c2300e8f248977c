"""A step of general distillation, beside the reference formulation and beside the matrix products it cannot do without.

    OMP_NUM_THREADS=2 python tests/bench/step.py [--lengths 128 512] [--students tiny4] [--rounds 5] [--tokens 4096]

(a) the reference formulation: fp32, the teacher keeps its graph, scores materialized; (b) plain eager without teacher
gradients; (c) this project: a step of its engine as `--engine` says (default: by device), fed as general.py feeds it.  Tries, on
request (`--forms c d f`): (d) is (c) with a second student of the same shape, (f) (c) as if no row were short, so that no
attention has a mask.  Teacher: BERT-base's shape, random weights.  Each runs in a process of its own, for its peak memory, and
the rounds of all take turns.  The floor of (c) is the sum, over every matrix product of a step, of that product's best time
alone (torch.mm, bmm) at its shape and type."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear")


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs under it: (shapes, type), attention's forward and backward ones included."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, tensors = function.overloadpacket.__name__, [x for x in args if isinstance(x, torch.Tensor)]
        if name in ("addmm", "mm", "bmm"):
            a, b = tensors[-2:]
            self.found[name.removeprefix("add"), tuple(a.shape), tuple(b.shape), str(a.dtype)] += 1
        elif "scaled_dot_product" in name and "attention" in name:
            q = tensors["backward" in name]  # a backward pass is given its output's gradient first
            batch, length, width = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
            score, mix = ((batch, length, width), (batch, width, length)), ((batch, length, length), (batch, length, width))
            # forward: QK^T and PV; backward: QK^T again, dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q
            for pair in [score, score, mix, mix, mix] if "backward" in name else [score, mix]:
                self.found["bmm", *pair, str(q.dtype)] += 1
        return function(*args, **(kwargs or {}))


def alone(product: tuple, device: torch.device, seconds: float = 0.3) -> float:
    """The best time of one matrix product by itself."""
    name, a, b, dtype = product
    a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype.removeprefix("torch."))) for shape in (a, b))
    function, best, end = getattr(torch, name), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        function(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def models(which: str, name: str, length: int):
    """(teacher, student, its layer map)."""
    from transformers import BertConfig, BertModel

    from pretrain.encoder import ATTENTION
    from pretrain.objective import layer_map
    from pretrain.recipe import SHAPES, Recipe
    from pretrain.student import Student, build_student

    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=max(512, length), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager" if which in "ab" else ATTENTION
    teacher = BertModel(config, add_pooling_layer=False)
    layers = layer_map("uniform", SHAPES[name].layers, 12)
    student: Student = build_student(name, SHAPES[name], teacher, layers, init="random", recipe=Recipe())
    if which in "ab":
        student.encoder.set_attn_implementation("eager")
    return teacher, student, layers


def plain_step(which: str, teacher, student, layers, optimizer, rows) -> None:
    """The reference formulation, written plainly: every score of both models, masked by -10000, zeroed below -100."""
    import torch.nn.functional as F

    ids, segments, real = rows
    mask = (1.0 - real[:, None, None, :].float()) * -10000.0

    def run(model):
        scores, hooks = [], []
        for layer in model.encoder.layer:
            def keep(module, given, _):
                x = given[0]
                q, k = (linear(x).view(*x.shape[:2], module.num_attention_heads, -1).transpose(1, 2)
                        for linear in (module.query, module.key))
                scores.append(q @ k.mT / q.shape[-1] ** 0.5 + mask)
            hooks.append(layer.attention.self.register_forward_hook(keep))
        hidden = model(input_ids=ids, token_type_ids=segments, attention_mask=real, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        return hidden, scores

    s_hidden, s_scores = run(student.encoder)
    with torch.set_grad_enabled(which == "a"):
        t_hidden, t_scores = run(teacher)
    loss = 0.0
    for m, n in enumerate(layers):
        s, t = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in (s_scores[m], t_scores[n - 1]))
        loss = loss + F.mse_loss(s, t)
    for m, n in zip(range(len(layers) + 1), [0, *layers], strict=True):
        projected = student.projection(s_hidden[m])
        loss = loss + F.mse_loss(projected, t_hidden[n])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def serve(which: str, name: str, length: int, tokens: int, engine_file: str | None, profile: bool) -> None:
    """One process: a step for each line of standard input -> its seconds; then peak memory and, for (c), the floor's products."""
    from pretrain.engine import Engine, device_type, join, read_engine_file
    from pretrain.objective import distil, weighted
    from pretrain.plan import ENGINES, fastest_dtype
    from pretrain.recipe import Recipe
    from pretrain.train import DTYPES

    ranks = join()
    rows = tokens // length
    g = torch.Generator().manual_seed(1)
    lengths = torch.where(torch.arange(rows) % 10 == 0, torch.randint(length // 4, length, (rows,), generator=g), length)
    real = torch.arange(length) < lengths[:, None]  # as shards are: one row in ten is short
    ids = torch.randint(1000, 30_000, (rows, length), generator=g) * real
    ids, segments, real = (x.to(ranks.device) for x in (ids, torch.zeros_like(ids), real))
    teacher, student, layers = models(which, name, length)
    teacher, student = teacher.to(ranks.device).eval(), student.to(ranks.device)
    if which not in "ab":
        path = Path(engine_file) if engine_file else ENGINES / ("cpu.json" if device_type() == "cpu" else "gpu-bf16.json")
        config = read_engine_file(path, device_type())
        recipe = Recipe(batch=rows, steps=10**6)
        students = [student, models(which, name, length)[1].to(ranks.device)] if which == "d" else [student]
        engines = [Engine(f"{name}-{n}", one, recipe, config, rows, ranks, drawn_at=0, saved=None, universal=False)
                   for n, one in enumerate(students)]
        mask = None if which == "f" else real
        teacher.requires_grad_(False).to(DTYPES[fastest_dtype()])

        def step() -> None:
            from pretrain.encoder import trace

            with torch.no_grad():
                wanted = trace(teacher, ids, segments, mask)
            for engine in engines:
                losses = weighted(distil(engine(ids, segments, mask), wanted, real, layers, recipe.weights), recipe.weights)
                engine.update(losses.mean(), 1, lambda part: None)
    else:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

        def step() -> None:
            plain_step(which, teacher, student, layers, optimizer, (ids, segments, real))

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    timed(), timed()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(), flush=True)
    peak = (torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    with Products() as products:
        step()
    work = sum(2 * n * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == 3 else 1) for (_, a, b, _), n in products.found.items())
    floor = sum(n * alone(product, ranks.device) for product, n in products.found.items()) if which == "c" else None
    print(json.dumps({"peak": peak, "floor": floor, "flops": work, "tokens": int(real.sum())}), flush=True)
    if profile and which == "c":
        with torch.profiler.profile() as prof:
            step(), step()
        print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def measure(name: str, length: int, given) -> None:
    """All three, a step of each in turn; prints their medians and ratios."""
    command = [sys.executable, __file__, "--students", name, "--lengths", str(length), "--tokens", str(given.tokens)]
    command += ["--engine", given.engine] * bool(given.engine) + ["--profile"] * given.profile
    running = {which: subprocess.Popen([*command, "--serve", which], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for which in given.forms}
    for process in running.values():
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "a process ended"
    seconds = {which: [] for which in running}
    for _ in range(given.rounds):
        for which, process in running.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[which].append(float(process.stdout.readline()))
    facts = {}
    for which, process in running.items():  # one after the other: the floor is measured alone
        process.stdin.close()
        facts[which] = json.loads(process.stdout.readline())
        process.wait()
    for which, fact in facts.items():
        step = median(seconds[which])
        rates = f"{given.tokens / length / step:,.1f} rows/s, {fact['tokens'] / step:,.0f} tokens/s"
        line = (f"{name} L={length} ({which}): {step:.2f} s a step ({min(seconds[which]):.2f} to {max(seconds[which]):.2f}), "
                f"{rates}, peak {fact['peak'] / 2**30:.2f} GiB, {fact['flops'] / step / 1e9:,.0f} GFLOP/s of matrix products")
        if fact["floor"]:
            line += f"; floor {fact['floor']:.2f} s, fraction {fact['floor'] / step:.1%}"
        if which in "df" and "c" in facts:
            apart = [x / y - 1 for x, y in zip(seconds[which], seconds["c"], strict=True)]
            line += f"; {median(apart):+.1%} of (c) ({min(apart):+.1%} to {max(apart):+.1%})"
        if which in "ab" and "c" in facts:
            line += (f"; (c) is {median(x / y for x, y in zip(seconds[which], seconds['c'], strict=True)):.2f} x as fast, with "
                     f"{facts['c']['peak'] / fact['peak']:.0%} of the memory")
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--students", nargs="+", default=["tiny4", "tiny6"])
    parser.add_argument("--forms", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, padding included")
    parser.add_argument("--engine", help="DeepSpeed file of (c)")
    parser.add_argument("--profile", action="store_true", help="the operations of (c) that take most, on standard error")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.serve:
        serve(given.serve, given.students[0], given.lengths[0], given.tokens, given.engine, given.profile)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    for name in given.students:
        for length in given.lengths:
            measure(name, length, given)


if __name__ == "__main__":
    main()
