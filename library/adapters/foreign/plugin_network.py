# SPDX-License-Identifier: Apache-2.0
"""A third-party network behind the interface AdapterNetwork. Errors of its code become one line that names its module.

Only this file probes for attributes, since networks implement different parts of the contract.
"""

from __future__ import annotations

import errno
import inspect
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork, NormReport, Rates, in_dtype
from library.adapters.foreign.published_model import PublishedModels
from library.adapters.formats.architecture import Tables
from library.adapters.formats.conversion import read_tensors, to_kohya, write_tensors
from library.adapters.formats.layer_tensors import COMFY_DORA
from library.adapters.formats.recognition import architectures_with
from library.adapters.layer_network import encoder_rate
from library.adapters.readers.trained_layer import TrainedLayer, foreign_layer
from library.adapters.target_spec import ReachedLayer
from library.device import is_out_of_memory, on_device
from library.errors import StopTraining, UserError, first_names
from library.log import get_logger

REQUIRED = ("apply_to", "prepare_optimizer_params", "load_weights", "save_weights")
OURS = ("library", "networks")  # packages
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LONGEST = 300  # letters of a message


def describe(error: BaseException) -> str:
    """Class and message of an error in one line; without a message, the place where it was raised."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    frames = traceback.extract_tb(error.__traceback__)
    text = text or (f"raised in {frames[-1].filename}, line {frames[-1].lineno}" if frames else "")
    return f"{type(error).__name__}: {text}"


def of_machine(error: BaseException) -> bool:
    """Whether an error is about memory or disk, which have messages of their own."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in FULL_DISK)


@contextmanager
def foreign_code(name: str, what: str) -> Iterator[None]:
    """Context in which errors of any class become a UserError `--network_module {name} {what}: ...`."""
    try:
        yield
    except (UserError, StopTraining):
        raise
    except (Exception, SystemExit) as error:
        if of_machine(error):
            raise
        raise UserError(f"--network_module {name} {what}: {describe(error)}") from error


def foreign_error(name: str, error: Exception) -> str | None:
    """One line for an error that a third-party --network_module raised in a pass; None for other errors."""
    package = name.partition(".")[0]
    if package in OURS or of_machine(error):
        return None
    callers = [module for module in _modules(error.__traceback__) if module in (package, *OURS)]
    return f"--network_module {name} failed: {describe(error)}" if callers and callers[-1] == package else None


def _modules(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        trace = trace.tb_next


class PluginNetwork(AdapterNetwork):
    """A third-party network behind the interface of ours."""

    network: Any

    def __init__(
        self,
        network: Any,
        models: PublishedModels,
        name: str,
        multiplier: float,
        weights: Mapping[str, Tensor] | None = None,
        *,
        tables: Tables,
    ):
        """tables: names of layers in files, for `load`."""
        super().__init__()
        self.tables = tables
        missing = [method for method in REQUIRED if not callable(getattr(network, method, None))]
        if not isinstance(network, nn.Module) or missing:
            lacks = ", ".join(missing) or "parameters (it is not an nn.Module)"
            raise UserError(f"--network_module {name}: its network lacks {lacks}")
        self.network = network
        self.models = (models,)  # in a tuple: the models' weights are not the adapter's
        self.module_name, self.multiplier, self.weights, self.attached = name, multiplier, weights, False
        self.reached: dict[int | None, list[ReachedLayer]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PluginNetwork:
        """Alphas keep their dtype: in another one (--full_fp16) they would be rounded, or overflow."""
        owners = [module for module in self.network.modules() if isinstance(module._buffers.get("alpha"), Tensor)]
        alphas = [module._buffers["alpha"] for module in owners]
        super()._apply(fn, recurse)
        for module, alpha in zip(owners, alphas, strict=True):
            now = module._buffers["alpha"]
            assert alpha is not None and now is not None
            module._buffers["alpha"] = alpha.to(now.device)
        return self

    def _code(self, what: str = "failed") -> Any:
        return foreign_code(self.module_name, what)

    def _call(self, method: str, *args: Any) -> Any:
        """Call an optional method of the contract; None when the network has no such method."""
        function = getattr(self.network, method, None)
        with self._code():
            return function(*args) if callable(function) else None

    def attach(self, *, train_denoiser: bool, train_text_encoder: bool) -> None:
        """Call its `apply_to`, which replaces the forward of modules. Must be called once."""
        models = self.models[0]
        with self._code():
            self.network.apply_to(models.text_encoder, models.unet, train_text_encoder, train_denoiser)
        self._call("prepare_grad_etc", models.text_encoder, models.unet)
        with self._code():
            self.reached = {place: model.changed() for place, model in models.by_place.items()}
        for model in models.all:
            model.join()
        self.attached = True
        if self.weights is not None:
            self.load(self.weights)

    def detach(self) -> None:
        """Call its `restore`, or that of each of its layers."""
        layers = [layer for layer in self.network.modules() if layer is not self.network]
        whole = callable(getattr(self.network, "restore", None))
        restorable = [self.network] if whole else [m for m in layers if callable(getattr(m, "restore", None))]
        if not restorable:
            raise UserError(f"--network_module {self.module_name} cannot be detached (it has no restore)")
        for model in self.models[0].all:
            model.part()
        with self._code():
            for layer in restorable:
                layer.restore()

    def layers_reached(self) -> dict[int | None, list[ReachedLayer]]:
        return self.reached

    def param_groups(
        self, *, learning_rate: float | None, unet_lr: float | None = None, text_encoder_lr: Rates = None
    ) -> list[dict[str, Any]]:
        many = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        prepare = many or self.network.prepare_optimizer_params
        places = self.models[0].places
        rates = [None if place is None else encoder_rate(text_encoder_lr, place) for place in places or (0,)]
        own = [rate for rate, place in zip(rates, places or (0,), strict=True) if place is not None]
        if not many and len({*own}) > 1:
            get_logger().warning(
                "--text_encoder_lr: --network_module %s takes one rate for all text encoders: %g is used",
                self.module_name, own[0],
            )  # fmt: skip
        encoder = (None if own[0] is None else rates) if many else own[0]
        args = [encoder, unet_lr, learning_rate]
        with self._code("makes no groups for the optimizer"):
            if not _takes(prepare, 3):
                args = [learning_rate if encoder is None else encoder, learning_rate if unet_lr is None else unet_lr]
            groups, names = _with_names(prepare(*args))
            return [
                {**group, "params": [*group["params"]], "name": name, "lr": group.get("lr", learning_rate)}
                for group, name in zip(groups, names, strict=True)
                if group.get("lr", learning_rate)
            ]

    def state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors that its `save_weights` writes, since some networks fold tensors together there."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            with self._code("writes no file"):
                self.network.save_weights(str(path), None, {})
            return in_dtype(read_tensors(path), dtype)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors, after `attach` if it is still to come: many networks create their layers in apply_to."""
        self.weights = dict(tensors)
        if not self.attached:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            known = to_kohya(tensors, self.tables, among=architectures_with(self.module_parameters(), self.tables))
            own = {key: value.detach().cpu().contiguous() for key, value in known.items()}
            refuse_comfy_dora(own, self.module_name)
            write_tensors(path, own, None)
            try:
                info = self.network.load_weights(str(path))
            except Exception as error:
                if of_machine(error):
                    raise
                line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
                raise UserError(f"the adapter file does not fit --network_module {self.module_name}: {line}") from None
        # torch's result, or a dict of LyCORIS
        unexpected = info.get("unexpected keys") if isinstance(info, Mapping) else getattr(info, "unexpected_keys", ())
        if unexpected:
            names = first_names([*unexpected])
            raise UserError(f"{len(unexpected)} keys of the adapter file belong to no adapter here: {names}")

    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        if not callable(getattr(self.network, "merge_to", None)):
            raise UserError(f"--network_module {self.module_name} cannot merge into a model (no merge_to)")
        models, strength = self.models[0], self.multiplier
        weights = self.state(None) if self.weights is None else self.weights
        with self._on_one_device() as (whole, device):
            before = None if strength == 1 else {n: p.detach().clone() for n, p in whole.named_parameters()}
            self.set_multiplier(1.0)
            with ExitStack() as held, self._code("cannot be merged"):
                for leaf in [leaf for model in models.all for leaf in model.fused]:
                    held.enter_context(leaf.held())
                self.network.merge_to(models.text_encoder, models.unet, weights, dtype, device)
            self.set_multiplier(strength)
            if before is not None:  # LyCORIS merges at strength 1 whatever its multiplier is, so the strength is ours
                with torch.no_grad():
                    for name, parameter in whole.named_parameters():
                        parameter.copy_(torch.lerp(before[name].float(), parameter.float(), strength))

    @contextmanager
    def _on_one_device(self) -> Iterator[tuple[nn.ModuleList, torch.device]]:
        """Context in which text encoders and network are on the device of the denoiser, as `merge_to` expects.

        Yields the models and the device, which may be main memory.
        """
        models = nn.ModuleList([m.model for m in self.models[0].all if m.model is not None])
        places = [next(model.parameters()).device for model in models]
        self.network.to(places[-1])
        try:
            yield models.to(places[-1]), places[-1]
        finally:
            for model, place in zip(models, places, strict=True):
                model.to(place)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.multiplier
        self.set_multiplier(0.0)
        try:
            yield
        finally:
            self.set_multiplier(before)

    def set_multiplier(self, multiplier: float) -> None:
        """Call its `set_multiplier`, or set the multiplier of every layer that has one."""
        self.multiplier = multiplier
        if callable(getattr(self.network, "set_multiplier", None)):
            self.network.set_multiplier(multiplier)
            return
        for layer in self.network.modules():
            if isinstance(getattr(layer, "multiplier", None), (int, float)):
                layer.multiplier = multiplier

    def scale_norms(self, max_norm: float) -> NormReport:
        if not callable(getattr(self.network, "apply_max_norm_regularization", None)):
            raise UserError(f"--scale_weight_norms: --network_module {self.module_name} does not support it")
        device = next(self.network.parameters()).device
        with self._code():
            found = self.network.apply_max_norm_regularization(max_norm, device)
        scaled, mean, maximum = (on_device(torch.as_tensor(value, dtype=torch.float32), device) for value in found)
        return NormReport(scaled, mean, maximum)

    def module_parameters(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            found.setdefault(name.partition(".")[0], []).append(parameter)
        return found

    def trained(self) -> list[TrainedLayer]:
        """The layers that have a name and hold the forward of the module that they replace."""
        found = []
        for layer in self.network.modules():
            name, forward = getattr(layer, "lora_name", None), getattr(layer, "org_forward", None)
            module = getattr(forward, "__self__", None)
            if isinstance(name, str) and callable(forward) and isinstance(module, nn.Module):
                # LyCORIS' full matrices take the module's own away and keep them
                own: Callable[[], Tensor] = partial(_weight, module, layer)
                bias = getattr(module, "bias", None)
                bias = (getattr(layer, "org_bias", None) or [None])[0] if bias is None else bias
                found.append(foreign_layer(name, layer, module, forward, own, bias))
        return found

    def epoch_started(self) -> None:
        models = self.models[0]
        self._call("on_epoch_start", models.text_encoder, models.unet)

    def enable_gradient_checkpointing(self) -> None:
        self._call("enable_gradient_checkpointing")


def _weight(module: nn.Module, layer: Any) -> Tensor:
    """Weight of a layer before its adapter; that of a fused layer is concatenated at each call."""
    weight = getattr(module, "weight", None)
    return layer.org_weight if weight is None else weight


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with `count` positional arguments."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= count


def _with_names(result: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups and their names from what prepare_optimizer_params returned: groups alone, or with descriptions."""
    groups, names = result if isinstance(result, tuple) else (result, None)
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in groups]
    return groups, [*names] if names and len(names) == len(groups) else [f"group {i + 1}" for i in range(len(groups))]


def refuse_comfy_dora(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises UserError for magnitudes that only ComfyUI's formula fits."""
    if any(key.endswith(f".{COMFY_DORA}") for key in tensors):
        raise UserError(
            f"--network_module {name} reads no DoRA of the comfy format: convert the file with "
            "convert_lora.py --to kohya --base_model ..."
        )
