"""HEART: the only file that imports deepspeed.  One ZeRO-1/2 engine for each student, its update and its files."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.ranks import Ranks, watch
from pretrain.recipe import Recipe, did_you_mean

OF_RECIPE = {"optimizer": "lr=, weight_decay=, beta1=, beta2=, eps=", "scheduler": "lr=, warmup=, steps=",
             "gradient_clipping": "clip=", "train_batch_size": "batch="}  # in the place of these keys of a DeepSpeed file
# DeepSpeed reads unknown keys of the top level without a word, so the ones that mean something here are listed.
KNOWN = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type",
         "prescale_gradients", "gradient_predivide_factor", "comms_logger", "wall_clock_breakdown", "memory_breakdown",
         "dump_state", "flops_profiler", "aio", "compile", "disable_python_gc", "log_level")


def read_engine_file(path: Path, device_type: str) -> dict:
    """A DeepSpeed file, checked.  ValueError names the key, what is wrong with it and where it belongs."""
    try:
        config = json.loads(path.read_text())
        _check(config, device_type)
    except OSError:
        close = did_you_mean(str(path), map(str, path.parent.glob("*.json")))
        raise ValueError(f"--engine {path}: no such file{close}") from None
    except ValueError as error:
        raise ValueError(f"--engine {path}: {error}; see ds_configs/") from None
    return config


def _check(config: dict, device_type: str) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    if not isinstance(config, dict):
        raise ValueError("no JSON object")
    for key in config:
        if key in OF_RECIPE:
            raise ValueError(f"{key!r} does not belong there; write it in the recipe ({OF_RECIPE[key]})")
        if key not in KNOWN:
            raise ValueError(f"{key!r} is decided by the run, or DeepSpeed would ignore it in silence{did_you_mean(key, KNOWN)}")
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():
        try:
            model.model_validate(config.get(name, {}))
        except ValueError as error:  # pydantic's
            first = error.errors()[0]
            close = did_you_mean(str(first["loc"][-1]), model.model_fields) if first["type"] == "extra_forbidden" else ""
            raise ValueError(f"{'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}{close}") from None
    if config.get("data_types") not in (None, *({"grad_accum_dtype": kind} for kind in ("fp32", "bf16", "fp16"))):
        raise ValueError(f"data_types is {config['data_types']}; write {{'grad_accum_dtype': 'fp32'}}, or nothing")
    if config.get("zero_optimization", {}).get("stage") not in (1, 2):
        raise ValueError("zero_optimization needs stage 2 (or 1): students are small, and 3 does not go with a teacher beside")
    micro = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or micro < 1:
        raise ValueError("needs train_micro_batch_size_per_gpu, the most rows held at once, 1 or more")
    if device_type == "cpu" and precision(config) == "fp16":
        raise ValueError("fp16 needs a GPU, and there is none here; use ds_configs/cpu.json")


def precision(config: dict) -> str:
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")


def offloads(config: dict) -> bool:
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def device_type() -> str:
    """`cuda` or `cpu`: DS_ACCELERATOR's where it is set, else told to DeepSpeed, which would warn that it had to guess."""
    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def join(timeout: float = 600, verbose: bool = False) -> Ranks:
    """Meet the other ranks; one that is not heard of for `timeout` seconds is lost.  Without a launcher: a run of one rank."""
    kind, given, wait = device_type(), os.environ, timedelta(seconds=timeout)
    import deepspeed.ops
    from deepspeed.utils.logging import set_log_level_from_string
    set_log_level_from_string("info" if verbose else "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    # Only inference uses this op, and DeepSpeed would compile it at start: 30 to 70 s, or an error without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    tasks = next(filter(None, map(given.get, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))), "1")
    if "RANK" not in given and tasks == "1":
        given.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # 0: a free one
    elif "RANK" not in given and {"SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():
        given.update(RANK=given["SLURM_PROCID"], WORLD_SIZE=tasks, LOCAL_RANK=given["SLURM_LOCALID"])
    elif "RANK" not in given:
        raise ValueError(f"{tasks} tasks were started, but RANK is not set in them, so each would be a run of its own; start "
                         "them as launch/slurm.sbatch does, or one a node with deepspeed launch/general.sh ..., or torchrun")
    local = given.get("LOCAL_RANK", "0")
    device = torch.device(kind, int(local)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed("nccl" if kind == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False, timeout=wait)
    except dist.DistError as error:
        port = given["MASTER_PORT"]
        raise ValueError(f"the ranks cannot meet at {given['MASTER_ADDR']}:{port} ({str(error).splitlines()[0]}); if "
                         f"another run has the port, write deepspeed --master_port {int(port) + 1} ...") from None
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo", timeout=wait))
    hosts = {rank: name for rank, name in enumerate(ranks.gathered(local == "0" and os.uname().nodename)) if name}
    if len(hosts) > 1 and ranks.rank in hosts:
        Thread(target=watch, args=(hosts, ranks.rank, timeout), daemon=True).start()
    return ranks


class Engine:
    """One student under DeepSpeed, its dropout drawn from (seed, name, rank, step), so that no other student moves it."""

    def __init__(self, name: str, student: nn.Module, recipe: Recipe, config: dict, micro: int, ranks: Ranks, *,
                 drawn_at: int, saved: Path | None, universal: bool):  # a step; a folder to go on from; is it to_universal's?
        import deepspeed
        self.name, self.recipe, self.ranks = name, recipe, ranks
        groups = [{"params": [p for p in student.parameters() if (p.ndim > 1) == yes],  # no bias and no LayerNorm
                   "weight_decay": recipe.weight_decay * yes} for yes in (True, False)]
        adam = torch.optim.AdamW
        if offloads(config) and ranks.device.type == "cuda":  # on a CPU torch's own is there: DeepSpeed would have to compile its
            from deepspeed.ops.adam import DeepSpeedCPUAdam as adam
        optimizer = adam(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
        whole = dict(config, train_batch_size=recipe.batch, train_micro_batch_size_per_gpu=micro, steps_per_print=2**31,
                     gradient_clipping=recipe.clip, checkpoint={"load_universal": universal}, zero_force_ds_cpu_optimizer=False)
        self.deepspeed, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=whole)
        self.deepspeed.checkpoint_engine.save = self._write
        self.module = self.deepspeed.module
        self.deepspeed._copy_recovery_script = lambda folder: None  # a write that `_write` does not see; exports hold fp32
        drawn = hashlib.sha256(f"{recipe.seed} dropout {name} {ranks.rank} {drawn_at}".encode()).digest()
        self.random = torch.Generator(ranks.device).manual_seed(int.from_bytes(drawn[:7], "big")).get_state()
        self.allowed = 20 if precision(config) == "fp16" else 0  # fp16's loss scale is found by skipping steps
        self.skipped = 0  # updates in a row
        if saved:
            _, state = self.deepspeed.load_checkpoint(str(saved), tag=name)
            self.random = self.random if universal else state["distil"]["random"][ranks.rank]

    def __call__(self, *batch: Tensor | None):
        """The student's trace of one micro batch, which is given as Student.forward takes it."""
        device = torch.cuda if self.ranks.device.type == "cuda" else torch
        device.set_rng_state(self.random)
        traced = self.deepspeed(*batch)
        self.random = device.get_rng_state()
        return traced

    def update(self, loss: Tensor, step: int, lap: Callable[[str], None]) -> None:
        """Backward of one micro batch's mean row loss; the update itself where the batch is complete."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step)  # a schedule object would stand still where DeepSpeed skips a step
        self.deepspeed.backward(loss)
        lap("student")
        self.deepspeed.step()
        lap("optimizer")

    def trouble(self) -> str | None:
        """What was wrong with the last update; to be called once after each."""
        self.skipped = 0 if self.deepspeed.was_step_applied() else self.skipped + 1
        if self.skipped > self.allowed:
            return f"the gradient is not finite ({self.skipped} updates skipped in a row)"
        if not self.skipped and not math.isfinite(self.gradient_norm()):
            return f"the gradient norm is {self.gradient_norm()}"
        return None

    def gradient_norm(self) -> float:
        """Of the last update, before clipping, over all ranks."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, Tensor]:
        """The student's fp32 master weights on the CPU.  Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param
        return {name: safe_get_full_fp32_param(p).detach().float().cpu().clone() for name, p in self.module.named_parameters()}

    def save(self, folder: Path) -> OSError | None:
        """Weights, optimizer and every rank's random state into folder/NAME -> what went wrong with this rank's files."""
        self.unwritten = None
        state = {"distil": {"random": self.ranks.gathered(self.random)},
                 "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # what the converter asks for
        self.deepspeed.save_checkpoint(str(folder), tag=self.name, client_state=state, save_latest=False)
        return self.unwritten

    def _write(self, state_dict: dict, path: str) -> None:
        """In the place of DeepSpeed's own, which would raise here and leave the other ranks at a barrier."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
            self.unwritten = OSError(f"{path} cannot be written ({str(error).splitlines()[0]}); is the disk full?")


def to_universal(tag: Path, students: list[str]) -> Path:
    """A checked tag -> a scratch folder in DeepSpeed's universal format, for any ranks, stage and precision.  For rank 0."""
    from deepspeed.checkpoint import ds_to_universal
    scratch = tag.parent / ".universal"
    shutil.rmtree(scratch, ignore_errors=True)  # a half-made one of a killed run
    how = dict(num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for name in students:
                ds_to_universal.main(Namespace(input_folder=str(tag / name), output_folder=str(scratch / name), **how))
    except (AssertionError, KeyError, RuntimeError) as error:
        raise ValueError(f"{tag} cannot be made a universal checkpoint ({error})") from error
    return scratch


def machine(config: dict, ranks: Ranks) -> dict:
    """What a checkpoint's files depend on besides the recipe; with another it is read through the universal one."""
    return {**config.get("data_types", {"grad_accum_dtype": None}), "zero_stage": config["zero_optimization"]["stage"],
            "precision": precision(config), "offload": offloads(config), "ranks": ranks.world, "device": ranks.device.type}
