"""`bash launch/general.sh --dry-run`: what a run will take, told by one process that needs neither GPU nor weights.

One micro batch goes through models of torch's fake tensors, while living tensors and matrix products are counted."""

import weakref
from argparse import Namespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModel, AutoModelForMaskedLM

from pretrain.encoder import ATTENTION, POOLED, model_config, trace
from pretrain.engine import device_type, offloads, precision
from pretrain.objective import distil, weighted
from pretrain.plan import ENGINES, Plan
from pretrain.student import build_student
from pretrain.train import DTYPES, PROJECTED_TOKENS
from shards.stream import Stream, micro_rows

ATTENTION_ON_CPU = {  # torch itself counts the kernels of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *oqkv, **_: sdpa_backward_flop_count(*oqkv[:4])}


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time, at most, beside those of `weights`."""

    def __init__(self, weights):
        super().__init__()
        self.known, self.weights, self.most = weakref.WeakSet(), {weight.untyped_storage() for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.known.update(x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.most = max(self.most, sum(storage.nbytes() for storage in self.known if storage not in self.weights))
        return out


def one_micro_batch(plan: Plan, rows: int, length: int) -> tuple[dict, int, int]:
    """The models, the teacher's name being ""; bytes beside their weights at most; floating-point operations."""
    config, recipe = model_config(plan.options.teacher), plan.recipe
    pooler = {"add_pooling_layer": False} if config.model_type in POOLED and not recipe.soft_mlm else {}
    kind = AutoModelForMaskedLM if recipe.soft_mlm else AutoModel
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as operations:
        teacher = kind.from_config(config, attn_implementation=ATTENTION, **pooler).eval().requires_grad_(False)
        models = {"": teacher} | {name: build_student(name, shape, teacher, plan.layers[name], "random", recipe)
                                  for name, shape in plan.students.items()}
        for name, model in models.items():
            for parameter in model.parameters():  # Module.to does not take fake ones
                parameter.data = parameter.data.to(DTYPES[precision(plan.engine) if name else plan.teacher_dtype])
        ids, words = torch.zeros(rows, length, dtype=torch.long), None
        if recipe.mlm or recipe.soft_mlm:  # the builds' 15 %
            words = torch.zeros(3, round(0.15 * rows * length), dtype=torch.long)
        with Living(p for model in models.values() for p in model.parameters()) as living:
            with torch.no_grad():
                traced = trace(teacher, ids, ids, real := ids == 0, words if recipe.soft_mlm else None)
            for name in plan.students:
                terms = distil(models[name](ids, ids, real, words), traced, real, plan.layers[name], recipe.weights,
                               relation_heads=recipe.relation_heads, padded=recipe.normalize == "padded", words=words)
                weighted(terms, plan.weights[name]).mean().backward()
                del terms
        return models, living.most, operations.get_total_flops()


def budget(given: Namespace) -> str:
    """Everything resolved, memory of a rank with its formula, steps, arithmetic and, with --tflops, time."""
    gpu = device_type() == "cuda" or bool(given.gpus)
    if given.gpus:  # of other machines
        given.engine = given.engine or str(ENGINES / "gpu-bf16.json")
        given.teacher_dtype = "bf16" if given.teacher_dtype == "auto" else given.teacher_dtype
    plan, ranks = Plan(given), given.gpus or 1
    recipe, engine, manifests = plan.recipe, plan.engine, plan.manifests.values()
    share = Stream([*manifests][0], None, seed=0, batch=recipe.batch, lanes=recipe.lanes, mask="none", world=ranks).mine.size
    micro, kind = micro_rows(share, engine["train_micro_batch_size_per_gpu"]), precision(engine)
    lengths = {manifest.row_length for manifest in manifests}
    seen = {length: one_micro_batch(plan, micro, length) for length in sorted(lengths)}
    models, living, _ = seen[length := max(lengths)]
    counts = {n: sum(p.numel() for p in model.parameters()) for n, model in models.items()}
    work = sum(steps * seen[manifest.row_length][2] for steps, manifest in zip(plan.steps, manifests)) * recipe.batch / micro
    own, t = sum(counts.values()) - counts[""], models[""].config
    zero = {"reduce_bucket_size": 5e8, "overlap_comm": False, **engine["zero_optimization"]}
    held = {f"teacher: {counts['']:,} parameters in {plan.teacher_dtype}": counts[""] * DTYPES[plan.teacher_dtype].itemsize,
            f"students: {own:,} parameters in {kind}": own * DTYPES[kind].itemsize,
            f"ZeRO: (4 master + 8 AdamW) bytes x students / {ranks} ranks; 0 here if offloaded": own * 12 / ranks * (
                not offloads(engine)),
            f"reduced gradients, and flat ones for the update: (4 + 4) bytes x students / {ranks} ranks": own * 8 / ranks,
            f"activations and gradients of {micro} rows of {length} tokens, counted": living,
            "DeepSpeed's buckets, on GPUs: reduce_bucket_size, twice with overlap_comm": gpu * DTYPES[kind].itemsize * (
                zero["reduce_bucket_size"] * (1 + zero["overlap_comm"]))}
    layers = 4 * t.num_hidden_layers + 10 + max(shape.layers for shape in plan.students.values())  # states held, some as copies
    start = 4 * PROJECTED_TOKENS * (t.hidden_size * layers + 4 * t.intermediate_size) + 4 * sum(counts.values())
    hours = work / ranks / 3.6e15
    lines = [str(recipe), f"engine {plan.engine_file}: {engine}",
             *(f"student {name}: {counts[name]:,} parameters, {shape}, init={plan.inits[name]}, like teacher layers "
               f"{plan.layers[name]}" for name, shape in plan.students.items()),
             f"batch {recipe.batch:,} = {micro} rows x {share // micro} micro batches x {ranks} ranks",
             "memory of a rank, beside what it holds after its imports:",
             *(f"{size / 1e9:9.3f} GB  {what}" for what, size in held.items()),
             f"{sum(held.values()) / 1e9:9.3f} GB  at most in a step; {start / 1e9:.3f} GB before it for init=projected",
             *(f"{steps:,} steps = {steps * recipe.batch / manifest.rows:.2f} passes over {manifest.rows:,} rows"
               for steps, manifest in zip(plan.steps, manifests)),
             f"{work / recipe.steps / 1e12:.4g} TFLOP a step at full length, {work / 1e18:.4g} EFLOP in all"]
    if given.tflops:
        lines.append(f"{hours / given.tflops:.4g} hours, {hours * ranks / given.tflops:.4g} GPU-hours at {given.tflops:g} TFLOPS")
    return "\n".join(lines)


def dry_run(given: Namespace, _stop) -> int:
    """In the place of pretrain.general.run -> exit code."""
    print(budget(given))
    return 0
