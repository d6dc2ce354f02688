"""MAE (arXiv 2111.06377): predict the pixels of masked patches from the visible ones.

`MaeNetwork.forward` is one training step up to the loss, in the paper's order: encode the visible patches, decode all,
and score the masked ones. Any modality whose tokens are patches of its input can use it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.masking import MaskConfig, masked_count
from d2v2ds.model.encoder import ExtraTokens
from d2v2ds.model.flops import block_flops
from d2v2ds.model.init import draw_by_class, initialise, trunk_parts
from d2v2ds.model.network import NetworkSettings
from d2v2ds.model.pixel_decoder import PixelDecoder, PixelDecoderConfig
from d2v2ds.model.transformer_decoder import MaskVector
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.data2vec2 import require_token_count, select_masked
from d2v2ds.objectives.data2vec2_metrics import prediction_losses, prediction_metrics
from d2v2ds.objectives.defaults import ObjectiveDefaults
from d2v2ds.objectives.loss import LossConfig, regression_loss
from d2v2ds.objectives.mae_metrics import UNITS, health_limits
from d2v2ds.objectives.protocol import HealthBounds, HealthLimit, Losses, Totals, Vectors
from d2v2ds.rng import kept_layers

_VARIANCE_EPS = 1e-6
_TOKEN_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class MaeModality:
    """Settings of the objective for one modality."""

    mask: MaskConfig
    """Masks over the patches of an input. Published: one `random` mask of 0.75."""
    decoder: PixelDecoderConfig
    """Decoder that predicts the masked patches."""
    normalise_pixels: bool = True
    """Bring every patch of the target to mean 0 and variance 1 (official name: `norm_pix_loss`)."""


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """Settings of MAE."""

    name: Literal["mae"] = "mae"
    modalities: Mapping[str, MaeModality]
    """Settings by modality."""

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        problems = []
        for name, own in self.modalities.items():
            if name not in trunk.modalities:
                continue  # `RunConfig.check` reports this
            network: NetworkSettings = trunk.modalities[name]
            faults = own.mask.check() + own.mask.grid_faults(network.grid_columns) + own.decoder.check()
            if network.patch_numbers is None:
                faults.append("mae predicts the patches of an input, found a modality without patches")
            if network.needs_all_tokens:
                faults.append("mae encodes visible patches alone, found relative positions, which need all patches")
            problems += [f"modalities.{name}: {fault}" for fault in faults]
        return problems

    def scaled(self, ratio: float) -> dict[str, float]:
        """Return nothing: no setting depends on the global batch."""
        return {}

    def build(self, trunk: TrunkConfig, seed: int) -> "Mae":
        """Build the objective of a run."""
        return Mae(self, trunk, seed)


class MaeOutput(TypedDict):
    """Output of one forward; sums are over this rank's rows. A dict, because ZeRO-3 must find the tensors."""

    losses: dict[str, Tensor]
    """Scalar fp32 sums by name."""
    local: Tensor
    """(B, T, D) local features, detached."""
    context: Tensor
    """(R, K, D) output of the encoder, detached."""
    decoded: Tensor
    """(R, T, P) predictions of all patches, detached."""
    target: Tensor
    """(B, T, P) fp32 targets of all patches."""
    pred: Tensor
    """(U, P) predictions of masked patches, detached."""
    wanted: Tensor
    """(U, P) fp32 targets of masked patches."""


class MaeNetwork(nn.Module):
    """Trunk and one decoder for each modality."""

    def __init__(
        self, trunk: TrunkConfig, modalities: Mapping[str, MaeModality], *, activation_checkpointing: bool = False
    ) -> None:
        """
        Args:
            trunk: settings of the trunk.
            modalities: settings of the objective by modality.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        self.modalities = {name: modalities[name] for name in trunk.modalities}
        self.settings: dict[str, NetworkSettings] = dict(trunk.modalities)
        self.trunk = Trunk(trunk, activation_checkpointing=activation_checkpointing)
        decoders: dict[str, nn.Module] = {}
        for name, network in self.settings.items():
            own, outputs = self.modalities[name].decoder, network.patch_numbers
            if outputs is None:
                raise ValueError(f"{name}: expected a modality with patches, found one without")
            positions = network.build_fixed_positions(own.width, network.num_extra_tokens)
            decoders[name] = PixelDecoder(
                own, trunk.block, positions, outputs, activation_checkpointing=activation_checkpointing
            )
        self.decoders = nn.ModuleDict(decoders)

    def forward(self, batch: Batch, kept_blocks: list[bool] | None = None) -> MaeOutput:
        """
        Args:
            batch: one micro-batch with masks.
            kept_blocks: layer drop of the trunk's blocks, the same on all ranks; None keeps all.

        Returns:
            Summed loss, and the tensors that metrics and health statistics read.
        """
        masks = batch.required_masks()
        keep, masked = masks.rows()  # (R, K), (R, T)
        own, network = self.modalities[batch.modality], self.settings[batch.modality]
        local = self.trunk.embed(batch)  # (B, T, D)
        require_token_count(local, masked, batch)
        encoded = self.trunk.encode_visible(local, batch, kept_blocks)  # (R, E + K, D)
        decoded = self.decoders[batch.modality](encoded, keep, masked.shape[1])  # (R, T, P)
        target = patch_targets(network.patches(batch.source), normalised=own.normalise_pixels)  # (B, T, P)
        pred = select_masked(decoded, masked, batch.num_masked)  # (U, P)
        wanted = select_masked(target.repeat_interleave(masks.num_masks, 0), masked, batch.num_masked)
        return MaeOutput(
            losses={"regression": regression_loss(pred, wanted, patch_loss(target.shape[-1]))},
            local=local.detach(),
            context=encoded[:, encoded.shape[1] - keep.shape[1] :].detach(),
            decoded=decoded.detach(),
            target=target,
            pred=pred.detach(),
            wanted=wanted,
        )


def patch_targets(patches: Tensor, *, normalised: bool) -> Tensor:
    """Compute targets (B, T, P) of patches (B, T, P) fp32, each brought to mean 0 and unbiased variance 1 if wanted."""
    if not normalised:
        return patches
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + _VARIANCE_EPS).sqrt()


def patch_loss(size: int) -> LossConfig:
    """Return the form of the loss: squared error, averaged over the P numbers of a patch."""
    return LossConfig(scale=1.0 / size)


class Mae(ObjectiveDefaults):
    """`Objective` of MAE: masks, network, loss, metrics and health statistics."""

    units: Mapping[str, str] = UNITS

    def __init__(self, config: MaeConfig, trunk: TrunkConfig, seed: int) -> None:
        """
        Args:
            config: settings.
            trunk: settings of the trunk.
            seed: of the run; layer drop draws from it.
        """
        self.config, self.trunk, self._seed = config, trunk, seed

    def mask(self, modality: str) -> MaskConfig:
        """Masks of a modality."""
        return self.config.modalities[modality].mask

    def build_network(self, *, activation_checkpointing: bool) -> MaeNetwork:
        """Build trunk and decoders."""
        return MaeNetwork(self.trunk, self.config.modalities, activation_checkpointing=activation_checkpointing)

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw the trunk, then each decoder from its own random stream, by MAE's rules."""
        assert isinstance(network, MaeNetwork)
        decoders = {f"decoders.{name}": decoder for name, decoder in network.decoders.items()}
        initialise(trunk_parts(network.trunk) | decoders, seed, _draw)

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run the network on one micro-batch; each step draws layer drop, validation has none."""
        drop_rate = 0.0 if step is None else self.trunk.layer_drop
        out: MaeOutput = network(batch, kept_layers(self._seed, step or 0, self.trunk.shared_depth, drop_rate))
        return prediction_losses(out, batch.num_masked, batch.required_masks().masked.numel())

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Count operations; the encoder reads visible patches only."""
        own, network, block = self.config.modalities[modality], self.trunk.modalities[modality], self.trunk.block
        tokens, rows, extra = network.num_tokens(size), num_samples * own.mask.num_masks, network.num_extra_tokens
        read = extra + tokens - masked_count(own.mask, tokens)
        forward = (
            network.local_flops(block.width, num_samples, size)
            + block_flops(block, self.trunk.depth(modality), rows, read)
            + own.decoder.flops(block, network.patch_numbers, rows, (read, extra + tokens))
        )
        return float(3.0 * forward)

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe masks, masked and visible patches."""
        mask = self.config.modalities[modality].mask
        masked = masked_count(mask, num_tokens)
        return f"{mask.num_masks} masks of {masked} masked and {num_tokens - masked} visible tokens"

    def count(self, batch: Batch) -> int:
        """Number of masked patches."""
        return batch.num_masked

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Return masked fraction, spread of predictions and targets, and the explained variance of the pixels."""
        return prediction_metrics(totals, 1.0 / totals.statistics["moments"].shape[-1])

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield local features, contextualised patches and predictions."""
        out: MaeOutput = losses.output
        keep, masked = batch.required_masks().rows()  # (R, K), (R, T)
        length = masked.shape[1]
        every = torch.arange(length).repeat(len(out["local"]))  # (B*T,)
        yield Vectors("local", out["local"].flatten(0, 1), every, length, reports_std=True)
        yield Vectors("context", out["context"].flatten(0, 1), keep.flatten(), length, reports_std=True)
        yield Vectors("pred", out["pred"], masked.nonzero()[:, 1], length)

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield predictions at masked patches."""
        out: MaeOutput = losses.output
        _, masked = batch.required_masks().rows()
        yield Vectors("pred", out["pred"], masked.nonzero()[:, 1], masked.shape[1])

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Return the bounds that a collapsed run crosses."""
        return health_limits(bounds)


def _draw(module: nn.Module) -> None:
    """Apply the rule of a module's class in models_mae.py: Xavier uniform, and N(0, 0.02) for learned tokens."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ExtraTokens):
        nn.init.normal_(module.tokens, std=_TOKEN_STD)
    elif isinstance(module, MaskVector):
        nn.init.normal_(module.vector, std=_TOKEN_STD)
    else:
        draw_by_class(module)
