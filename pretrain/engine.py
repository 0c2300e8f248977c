"""HEART: the only file that imports deepspeed.  Ranks, one ZeRO-1/2 engine for each student, their update.

The recipe owns what is learned; a file of ds_configs/ owns how the machine runs it.  Accumulation is derived.
"""

import importlib
import json
import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.recipe import Recipe, did_you_mean

OWNED = {  # keys of a DeepSpeed file that another place owns here, and where to write them instead
    "optimizer": "the recipe (lr=, weight_decay=, betas=, eps=)", "scheduler": "the recipe (lr=, warmup=, steps=)",
    "gradient_clipping": "the recipe (clip=)", "train_batch_size": "the recipe (batch=)",
    "gradient_accumulation_steps": "nowhere: it is derived from batch, ranks and train_micro_batch_size_per_gpu",
    "tensorboard": "nowhere: a run always writes TensorBoard events to OUT/tensorboard",
    "csv_monitor": "nowhere: a run always writes OUT/metrics.jsonl", "wandb": "nowhere", "comet": "nowhere",
}
# DeepSpeed reads unknown keys of the top level without a word, so the ones that mean something here are listed.
KNOWN = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type",
         "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "comms_logger", "wall_clock_breakdown",
         "memory_breakdown", "dump_state", "flops_profiler", "aio", "compile", "zero_force_ds_cpu_optimizer",
         "torch_autocast", "disable_python_gc", "log_level")
PLAIN = {  # sections that DeepSpeed reads key by key, the rest of them in silence too
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}
SECTIONS = {  # sections whose keys DeepSpeed's own models know
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
}


def read_engine_file(path: Path, device_type: str) -> dict:
    """A DeepSpeed file, checked.  ValueError names the key, what is wrong with it and where it belongs."""
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ValueError(f"--engine {path}: no such file{did_you_mean(str(path), there)}"
                         + (f" (there are {', '.join(there)})" if there else ""))
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--engine {path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"--engine {path}: holds no JSON object; write {{...}} as in ds_configs/cpu.json")
    for key in config:
        if key in OWNED:
            raise ValueError(f"--engine {path}: {key!r} does not belong there; write it in {OWNED[key]}")
        if key not in KNOWN:
            raise ValueError(f"--engine {path}: DeepSpeed would ignore {key!r} in silence{did_you_mean(key, KNOWN)}")
    for name in (*SECTIONS, *PLAIN):
        if name in config:
            _check_section(path, name, config[name])
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ValueError(f"--engine {path}: zero_optimization.stage is {stage}; write 2 (or 1): the students are small, "
                         "and stage 3 does not go with a teacher beside them")
    micro = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or micro < 1:
        raise ValueError(f"--engine {path}: needs train_micro_batch_size_per_gpu, the most rows held at once, 1 or more")
    if device_type == "cpu" and (precision(config) == "fp16" or offloads(config)):
        raise ValueError(f"--engine {path}: fp16 and offload need a GPU, and there is none here; use ds_configs/cpu.json")
    return config


def _check_section(path: Path, name: str, section: dict) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"--engine {path}: {name} is {section!r}; write a JSON object, such as {{}}")
    model = getattr(importlib.import_module(SECTIONS[name][0]), SECTIONS[name][1]) if name in SECTIONS else None
    known = PLAIN.get(name) or {*model.model_fields, *(f.alias for f in model.model_fields.values() if f.alias)}
    for key in section:
        if key not in known:
            raise ValueError(f"--engine {path}: {name} has no {key!r}{did_you_mean(key, known)}")
    try:
        if model:
            model(**section)
    except ValueError as error:  # pydantic's is one
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": error}
        raise ValueError(f"--engine {path}: {name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def precision(config: dict) -> str:
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")


def offloads(config: dict) -> bool:
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    world: int
    device: torch.device
    talk: dist.ProcessGroup  # gloo, for what is on the CPU

    def agree(self, error: Exception | None) -> None:
        """Every rank calls it at the same point; where one has an error all raise it, so that none is left waiting."""
        wrong = torch.tensor(error is not None, dtype=torch.int32)
        dist.all_reduce(wrong, dist.ReduceOp.MAX, group=self.talk)
        if wrong.item():
            texts = [None] * self.world
            dist.all_gather_object(texts, str(error) if error else None, group=self.talk)
            first = next(text for text in texts if text)
            raise ValueError(first if texts.count(first) == self.world else f"rank {texts.index(first)}: {first}") from error


def device_type() -> str:
    """`cuda` or `cpu`: DS_ACCELERATOR's where it is set, else told to DeepSpeed, which would warn that it had to guess."""
    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def join() -> Ranks:
    """Meet the other ranks.  A process that no launcher started is a run of one rank."""
    kind = device_type()
    import deepspeed
    import deepspeed.ops

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    # Only inference uses this op, and DeepSpeed would compile it at start: 30 to 70 s, or an error without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
        if tasks != "1":
            raise ValueError(f"{tasks} tasks were started, but RANK is not set in them, so each would be a run of its own; "
                             "start one task a node with deepspeed launch/general.sh ..., or torchrun")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(local)
    try:
        deepspeed.init_distributed("nccl" if kind == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        port = os.environ["MASTER_PORT"]
        raise ValueError(f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{port} ({str(error).splitlines()[0]}); if "
                         f"another run has the port, write deepspeed --master_port {int(port) + 1} ...") from None
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def leave() -> None:
    """Without it a rank can abort while the others still talk to it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """One student under DeepSpeed."""

    def __init__(self, name: str, student: nn.Module, recipe: Recipe, config: dict, micro: int):
        import deepspeed

        self.name, self.recipe = name, recipe
        decayed = [p for n, p in student.named_parameters() if not _undecayed(n)]
        kept = [p for n, p in student.named_parameters() if _undecayed(n)]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        adam = torch.optim.AdamW
        if offloads(config):
            from deepspeed.ops.adam import DeepSpeedCPUAdam as adam
        optimizer = adam(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
        whole = {**config, "train_batch_size": recipe.batch, "train_micro_batch_size_per_gpu": micro,
                 "gradient_clipping": recipe.clip, "steps_per_print": 2**31}
        self.deepspeed, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=whole)

    def __call__(self, ids: Tensor, segments: Tensor, real: Tensor | None):
        """The student's trace of one micro batch."""
        return self.deepspeed(ids, segments, real)

    def update(self, loss: Tensor, step: int) -> None:
        """Backward of one micro batch's mean row loss; the update itself where the batch is complete."""
        for group in self.deepspeed.optimizer.param_groups:
            # Set from the step's number, not by a schedule object, which stands still where DeepSpeed skips a step.
            group["lr"] = self.recipe.rate(step)
        self.deepspeed.backward(loss)
        self.deepspeed.step()

    def gradient_norm(self) -> float:
        """Of the last update, before clipping, over all ranks."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def weights(self) -> dict[str, Tensor]:
        """The student's fp32 master weights on the CPU.  Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().float().cpu().clone()
                for name, p in self.module.named_parameters()}

    def save(self, folder: Path, state: dict) -> None:
        """Weights and optimizer into folder/NAME.  DeepSpeed syncs nothing: pretrain.checkpoint makes it whole."""
        self.deepspeed.save_checkpoint(str(folder), tag=self.name, client_state={"distil": state}, save_latest=False)

    def load(self, folder: Path) -> dict:
        """Weights and optimizer from folder/NAME -> the state given to `save` (rank 0's, on every rank)."""
        _, state = self.deepspeed.load_checkpoint(str(folder), tag=self.name)
        return state["distil"]


def _undecayed(name: str) -> bool:
    return name.endswith("bias") or "LayerNorm" in name


def machine(config: dict, world: int) -> dict:
    """What a checkpoint's files depend on besides the recipe."""
    zero = config["zero_optimization"]
    return {"ranks": world, "zero_stage": zero["stage"], "precision": precision(config),
            "offload": offloads(config)}
