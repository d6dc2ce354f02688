"""`Modality`: everything that the rest of the project asks of a kind of input.

One object per modality, in a folder of its own. Nothing outside that folder compares a modality's name. Members with a
default are optional; a modality of another project (`examples/sensors/`) overrides what it needs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from d2v2ds.data.reader import DataSettings, Reader, Unit
from d2v2ds.data.schema import Index
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ConfigError
from d2v2ds.modalities.demo import Prepared
from d2v2ds.modalities.inference import GraphInput, HubInput, Inference


@dataclass(frozen=True, kw_only=True)
class ProbeDefaults:
    """Settings of a probe where none are given."""

    c: float = 1.0
    """Inverse strength of the L2 of logistic regression."""
    neighbours: int = 5
    """Neighbours of the kNN probe."""
    uses_middle_block: bool = False
    """True: the verdict is about the middle block, False: about the last one."""


@dataclass(frozen=True)
class Baseline:
    """Features that need no model."""

    name: str
    compute: Callable[[Iterable[Tensor]], Any]
    """Whole inputs -> (N, ...) matrix, dense or sparse."""


class Modality:
    """One kind of input."""

    name: ClassVar[str]
    """Key in the configuration, and first word of the shards' names."""
    shards: ClassVar[type[Shards]]
    """Access to the rows of a packed folder."""
    must_be_equal: ClassVar[tuple[str, ...]] = ()
    """Entries of `Index.format` that folders must have in common to be read as one."""
    packer: ClassVar[str]
    """Command that packs a folder, for messages: python -m preprocessing.pack_audio."""
    network: ClassVar[type]
    """Dataclass of the section `model.modalities.NAME`; its instances are `NetworkSettings`."""
    data: ClassVar[type]
    """Dataclass of the section `data.NAME`; its instances are `DataSettings`."""
    reader: ClassVar[Callable[..., Reader]]
    """(joined shards, data settings, network settings, masks or None) -> reader."""
    unit: ClassVar[Unit]
    """Unit of amounts."""
    input_layer: ClassVar[str] = "local"
    """Part of the encoder that `packed_faults` is about: if a run draws it anew, other inputs do no harm."""
    probe: ClassVar[ProbeDefaults] = ProbeDefaults()
    """Settings of a probe where none are given."""
    baseline: ClassVar[Baseline | None] = None
    """Features without a model, as a yardstick for a probe."""
    hub: ClassVar[HubInput | None] = None
    """Name of the input in transformers; None: exports carry no files for transformers."""
    graph: ClassVar[GraphInput | None] = None
    """Input of an ONNX graph; None: no ONNX export."""

    def run_length(self, run: Any) -> float | None:
        """Amount, in `unit`, that the section `run` asks for in a setting of this modality; None if it does not."""
        return None

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Data settings that read a folder for evaluation, as a model with this preprocessing expects it.

        Raises:
            ConfigError: the modality has no such settings.
        """
        raise ConfigError(f"{self.name}: packed folders cannot be read for evaluation; the modality lacks whole_inputs")

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """Describe what happens to an input before the network reads it; travels with exported weights.

        Args:
            network: settings of the network.
            data: settings of the run's data; None for weights from elsewhere.
            index: of the run's first packed folder; None if it cannot be read. What only an index says is absent then.
        """
        return {}

    def files_beside(self, preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
        """Files that lie beside exported weights, such as a tokenizer."""
        return ()

    def packed_faults(self, model_folder: Path, preprocessing: Mapping[str, Any], shards: Path) -> list[str]:
        """Return one message for each reason why packed rows do not mean what they meant to an exported model."""
        return []

    def row_faults(self, preprocessing: Mapping[str, Any], shards: Path) -> list[str]:
        """Return one message for each reason why packed rows are of another kind than those of a fine-tuned model.

        Args:
            preprocessing: of the model, from `describe_preprocessing` with the index of its training data.
            shards: folder of other rows with labels.
        """
        return []

    def prepare_demo(self, runs: Path, data: Path | None) -> Prepared:
        """Pack data for `d2v2ds.demo`.

        Args:
            runs: folder for everything that is written.
            data: the user's own; None makes a sample.
        """
        raise ConfigError(f"{self.name}: there is no demonstration")

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> Inference:
        """Build what turns raw inputs into sources of an exported model.

        Raises:
            ConfigError: the modality takes packed inputs only.
        """
        raise ConfigError(f"{self.name}: raw inputs cannot be read; pack them and use d2v2ds.extract")
