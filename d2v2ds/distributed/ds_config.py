"""DeepSpeed's JSON: load it, fill in the run's numbers, refuse what contradicts them. Pure functions.

The JSON owns memory, precision and communication; the run owns the algorithm. A number of the algorithm is written
"auto" in the JSON (or left out) and filled in here. `ds_configs/README.md` explains each key of the shipped files.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import is_there, read_json

SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"

REQUIRED: dict[str, Any] = {
    # the optimizer and its schedule are the run's: DeepSpeed gets a finished torch optimizer
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""Keys that this room needs at one value; filled in where absent."""

RUN_OWNED_SECTIONS = ("optimizer", "scheduler", "tensorboard", "wandb", "csv_monitor", "data_efficiency", "fp16", "amp")
"""Sections that must not appear: the run owns the optimizer, schedule, logging and data; fp16 is not supported."""

KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "data_types", "communication_data_type", "aio",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "disable_python_gc",
}  # fmt: skip
"""Keys of the JSON that have a meaning here. DeepSpeed itself passes over any key that it does not know."""

DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")
"""Keys of `data_types`, for which DeepSpeed has no model of its own."""

CHOICES = {
    "data_types.grad_accum_dtype": ("bf16", "bfloat16", "fp32", "float32"),
    "communication_data_type": ("bf16", "fp16", "fp32"),
    "zero_optimization.compute_grad_norm": (True,),  # every step reports the norm
    "gradient_allreduce_op": ("mean",),  # `engine.gradient_sum_factor` undoes it
}
"""Settings that DeepSpeed checks late or not at all."""

OLD_KEYS = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_params": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory" in offload_optimizer or offload_param',
}
"""Deprecated keys of `zero_optimization` and what replaces them: they would pass by the rules for the new ones."""

SECOND_COPY = "hpZ computes with a second copy of the weights, which neither the teacher nor a resume writes"
STORED_INT8 = "frozen weights would lie in int8, which neither the teacher nor a checkpoint reads"
UNSUPPORTED_KEYS = {
    "zero_quantized_weights": "DeepSpeed compiles its kernels at the start; they are not tested with a teacher",
    "zero_quantized_gradients": "DeepSpeed compiles its kernels at the start; they are not tested with skipped blocks",
    "zero_quantized_nontrainable_weights": STORED_INT8,
}
"""Switches of `zero_optimization` that must be off."""

GATHERING = {
    "stage", "overlap_comm", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "leaf_module",
    "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
    "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
}  # fmt: skip
"""Keys of `zero_optimization`, less their "stage3_", that say how weights are gathered: the teacher has the same."""


def load_ds_config(name_or_path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Args:
        name_or_path: name of a file in `ds_configs/` without its ending, or a path.

    Raises:
        ConfigError: if there is no such file or it is not a JSON object.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = SHIPPED_FOLDER / f"{name_or_path}.json"
    if not is_there(path, ConfigError):
        shipped = ", ".join(sorted(file.stem for file in SHIPPED_FOLDER.glob("*.json")))
        raise ConfigError(f"DeepSpeed config {name_or_path}: no file {path}; give a path or one of: {shipped}")
    config = read_json(path, ConfigError)
    if path.parent != SHIPPED_FOLDER and (faults := _faults(config, f"DeepSpeed config {path}")):
        raise ConfigError("\n".join(faults))
    return config


def _faults(config: Mapping[str, Any], source: str) -> list[str]:
    """Unknown keys and wrong types, which DeepSpeed would find when the processes already wait for each other."""
    # Here, because they take seconds, and the shipped files are tested.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "comms_logger": CommsLoggerConfig}
    names = {
        "data_types": DATA_TYPES,
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
        "aio": AIO_DEFAULT_DICT,
    }
    faults = []
    for key, value in config.items():
        if key in RUN_OWNED_SECTIONS:
            continue  # said when it is merged
        if key == "activation_checkpointing":
            faults.append(
                f"{source} has {key!r}: remove it; the run owns it (engine.activation_checkpointing), block by block"
            )
        elif key not in KNOWN:
            faults.append(f"{source} has an unknown key {key!r}{_nearest(key, KNOWN)}")
        elif key in models.keys() | names.keys() and not isinstance(value, dict):
            faults.append(f"{source}: {key} is {value!r}, expected an object")
        elif key in models:
            faults += [f"{source}: {fault}" for fault in _section_faults(key, value, models[key])]
        elif key in names:
            unknown = [name for name in value if name not in names[key]]
            faults += [f"{source} has an unknown key {key}.{name}{_nearest(name, names[key])}" for name in unknown]
    for key, choices in CHOICES.items():
        section, _, leaf = key.rpartition(".")
        holder = config.get(section, {}) if section else config
        found = holder.get(leaf) if isinstance(holder, dict) else None
        if found not in (None, "auto", *choices):
            faults.append(f"{source}: {key} = {found!r}, expected one of {', '.join(map(repr, choices))}")
    return faults


def _section_faults(section: str, values: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    """Faults that DeepSpeed's own model of a section finds."""
    fields = {field.alias or name for name, field in model.model_fields.items()}
    given = {name: value for name, value in values.items() if name not in OLD_KEYS}  # refused when it is merged
    try:
        model(**given)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name, found = ".".join(map(str, fault["loc"])), fault["input"]
            where = f"{section}.{name} = {found!r}" if name else section
            faults.append(f"{where}: {fault['msg']}{_nearest(name, fields) if name not in fields else ''}")
        return faults
    # It takes "false" for false and "3" for 3; whoever reads the JSON here does not.
    texts = {name: value for name, value in given.items() if isinstance(value, str) and value != "auto"}
    return [f"{section}.{name} = {value!r} is text; write {value.lower()}" for name, value in texts.items()]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def merge_ds_config(
    config: Mapping[str, Any], run: Mapping[str, Any], source: str = "DeepSpeed config"
) -> dict[str, Any]:
    """Fill the run's numbers into a DeepSpeed JSON.

    Args:
        config: the JSON; not changed.
        run: the run's value of each shared key, nested keys with dots, for example
            `{"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}`.
        source: how messages call the JSON.

    Returns:
        A new JSON without "auto", ready for `deepspeed.initialize`.

    Raises:
        ConfigError: listing every contradiction at once.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(config))
    faults = [
        f"{source} has {section!r}: remove it; the run owns the optimizer, schedule, logging and data, "
        "and precision is bf16 or fp32"
        for section in RUN_OWNED_SECTIONS
        if section in merged
    ]
    required = dict(REQUIRED)
    if merged.get("bf16", {}).get("enabled", False):
        required["bf16.check_grad_overflow"] = True  # stages 1 and 2 apply a non-finite step in bf16 without it
    for key, value in {**run, **required}.items():
        owner = "the run" if key in run else "this toolkit"
        parent, leaf = _descend(merged, key)
        found = parent.get(leaf, "auto")
        if found == "auto":
            parent[leaf] = value
        elif found != value:
            faults.append(f'{source} says {key} = {found!r}, {owner} says {value!r}; write "auto" in the JSON')
    faults += [f'{source} leaves {key} = "auto" and the run has no value for it' for key in _auto_keys(merged)]
    faults += _unsupported(merged, source)
    if faults:
        raise ConfigError("\n".join(faults))
    return merged


def _unsupported(config: Mapping[str, Any], source: str) -> list[str]:
    """Settings that DeepSpeed computes wrongly, or that the teacher cannot follow."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    is_bf16 = bool(config.get("bf16", {}).get("enabled", False))
    faults = [
        f"{source} has {key}, an old spelling; write {new} instead" for key, new in OLD_KEYS.items() if key in zero
    ]
    faults += [
        f"{source} has {key} = {zero[key]!r}: {why}; remove it"
        for key, why in UNSUPPORTED_KEYS.items()
        if zero.get(key)
    ]
    if (ranks := zero.get("zero_hpz_partition_size", 1)) not in (0, 1):
        faults.append(f"{source} has zero_hpz_partition_size = {ranks!r}: {SECOND_COPY}; remove it")
    if config.get("bf16", {}).get("bf16_master_weights_and_grads"):
        faults.append(
            f"{source} has bf16_master_weights_and_grads: the teacher averages fp32 master weights; remove it"
        )
    if is_bf16 and stage == 0:
        faults.append(f"{source} combines bf16 with ZeRO stage 0, which keeps no usable fp32 master; use stage 1")
    if is_bf16 and stage == 1 and config.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32"):
        faults.append(
            f"{source} asks for fp32 gradient accumulation in bf16 at stage 1, where DeepSpeed changes to another "
            "optimizer class; use stage 2 or 3, or remove data_types.grad_accum_dtype"
        )
    if stage == 1 and zero.get("overlap_comm"):
        faults.append(
            f"{source} has overlap_comm at stage 1, where DeepSpeed reduces only gradients of modules that ran in the "
            "last micro-batch of a step; set it to false, or use stage 2 or 3"
        )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload == "nvme":
        faults.append(f'{source} offloads the optimizer to NVMe; the teacher reads the master weights: use "cpu"')
    if (zero.get("offload_param") or {}).get("device", "none") == "nvme":
        faults.append(f'{source} offloads weights to NVMe, which neither the teacher nor a checkpoint reads; use "cpu"')
    if offload == "cpu" and stage in (1, 2):
        faults.append(
            f"{source} offloads the optimizer at stage {stage}, where DeepSpeed steps a module that did not run with "
            "its old gradient; use stage 3"
        )
    return faults


def teacher_ds_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a partitioned module that is never trained, derived from its student's at stage 3.

    It says how weights are cut, gathered and computed with, and nothing else: an optimizer or a schedule would be
    built for it, timers and monitors would run twice. No parameter is kept gathered: DeepSpeed refreshes such copies
    after its own optimizer step only, so an averaged teacher would go on computing with stale norms and biases.

    Args:
        config: any DeepSpeed JSON that works, of this toolkit or not.
    """
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if key.removeprefix("stage3_") in GATHERING and value != "auto"
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number
        "bf16": {"enabled": config.get("bf16", config.get("bfloat16", {})).get("enabled", False)},
        "zero_optimization": copy.deepcopy(zero) | {"stage3_param_persistence_threshold": 0},
    }


def _descend(config: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The object that holds a dotted key, made if need be, and the last part of the key."""
    *sections, leaf = dotted.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    return config, leaf


def _auto_keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
