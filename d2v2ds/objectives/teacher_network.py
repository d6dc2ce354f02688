"""Network of the teacher: unmasked tokens in, targets out (arXiv 2212.07525, section 3).

`distributed.teacher` pairs its parameters with the student's by name. The published teacher has positions, distance
penalty, extra tokens, prenet and shared blocks, but no decoder; a local encoder only with `share_local_encoder=false`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.targets import TargetConfig, make_targets


class TeacherNetwork(nn.Module):
    """Makes targets; always in eval mode and without gradient."""

    def __init__(
        self,
        trunk: TrunkConfig,
        targets: Mapping[str, TargetConfig],
        share_local_encoder: Mapping[str, bool],
        *,
        clear_padding: bool = False,
    ) -> None:
        """
        Args:
            trunk: settings of the student's trunk.
            targets: settings of the targets, by modality.
            share_local_encoder: by modality, True if the teacher reads the student's local features.
            clear_padding: write zeros into padded tokens before their positions, as data2vec 1.0 does.
        """
        super().__init__()
        self.targets, self.clear_padding = dict(targets), clear_padding
        self.trunk = Trunk(trunk, with_local={name: not shared for name, shared in share_local_encoder.items()})

    def forward(self, batch: Batch, local: Tensor) -> Tensor:
        """
        Args:
            batch: the student's micro-batch; its masks are not read.
            local: (B, T, D) the student's local features, detached; unused if the teacher has its own local encoder.

        Returns:
            (B, T, D) fp32 targets.
        """
        config = self.targets[batch.modality]
        layers = self.trunk.target_layers(batch, local, config.layer, clear_padding=self.clear_padding)
        return make_targets(layers, config)
