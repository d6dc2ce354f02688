"""The teacher's network: unmasked tokens in, targets out (spec sections 1.9 and 7).

Its parameter names are those of the student, which is how `dist.teacher` pairs the two. Which modules it
has is the published scope: positions, ALiBi scale, extra tokens, prenet and shared blocks; the local encoder only
where `share_local_encoder` is off; never the decoder. Of text without own blocks that leaves the shared blocks alone.
"""

from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.model.block import Block
from d2v2ds.model.encoder import ModalityEncoder, run_blocks
from d2v2ds.model.trunk import ENCODERS, ModelConfig
from d2v2ds.objectives.targets import make_targets


class TargetNet(nn.Module):
    """Makes targets; always in eval mode and without gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict(
            {
                name: ENCODERS[name](
                    modality, config.block, config.shared_depth, with_local=not modality.share_local_encoder
                )
                for name, modality in config.modalities.active().items()
            }
        )
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.shared_depth))

    def forward(self, batch: Batch, local: Tensor) -> Tensor:
        """
        Args:
            batch: the student's micro-batch; its masks are not looked at.
            local: (B, T, D) the student's local features, detached; unused with an own local encoder.

        Returns:
            (B, T, D) fp32 targets.
        """
        encoder: ModalityEncoder = self.encoders[batch.modality]  # type: ignore[assignment]
        modality = self.config.modalities.active()[batch.modality]
        if not modality.share_local_encoder:
            local = encoder.embed(batch)
        prenet_depth = len(encoder.prenet.blocks)
        x, biases = encoder.everything(local, batch.padding, prenet_depth + len(self.blocks))  # (B, E + T, D)
        x, _ = run_blocks(encoder.prenet.blocks, x, biases[:prenet_depth])
        _, layers = run_blocks(self.blocks, x, biases[prenet_depth:])  # L x (B, E + T, D)
        return make_targets([layer[:, encoder.num_extra_tokens :] for layer in layers], modality.target)
