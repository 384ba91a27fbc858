"""traker 0.3.2: TRAK at the last checkpoint, on its CPU projector, with gradients of all trainable parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.scores._base import Adapter, Case, Lines, Scored, load_model
from benchmarks.rivals.scores.dattri import trak_size
from benchmarks.system.index_case import pad

BATCH = 16
# it draws its projection matrix anew for every batch: of full weights (4 M) 128 columns are what finishes
MOST = {"lora": 512, "full": 128}


class Trainable(nn.Module):
    """A model that lists its trainable parameters only: the iterative computer differentiates all that are listed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.hidden = [model]  # in a list, so that it is no submodule
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.listed = nn.ParameterList(trainable)  # the same objects

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's loss [B, T - 1], zero where not supervised, and which are."""
        logits = self.hidden[0](input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        return losses, wanted != -100


def trak(case: Case, place: Path) -> Scored:
    from trak import TRAKer
    from trak.gradient_computers import IterativeGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class ResponseOdds(AbstractModelOutput):
        """The summed log(p / (1 - p)) of a row's response tokens, and 1 - their mean p."""

        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Any, weights: None, buffers: None, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            losses, supervised = model(ids, labels, mask)
            rest = torch.log(-torch.expm1(-losses.clamp(min=1e-6)))
            return ((-losses - rest) * supervised).sum(1)

        def get_out_to_loss_grad(self, model: Any, weights: None, buffers: None, batch: Any) -> Tensor:
            losses, supervised = model(*batch)
            return (1 - ((-losses).exp() * supervised).sum(1) / supervised.sum(1)).detach()[:, None]

    model = Trainable(load_model(case))
    size = trak_size(len(case.rows), MOST[case.method])
    numbers = sum(parameter.numel() for parameter in model.parameters())
    # its projector of one block frees its matrix between batches and then misses it: two blocks at least
    projector = BasicProjector(numbers, size, 0, ProjectionType.rademacher, "cpu", block_size=min(64, size // 2))
    traker = TRAKer(
        model=model,
        task=ResponseOdds(),
        train_set_size=len(case.rows),
        save_dir=str(place),
        device="cpu",
        gradient_computer=IterativeGradientComputer,
        projector=projector,
        proj_dim=size,
        use_half_precision=False,
        logging_level=30,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    rows, queries = Lines(case.rows), Lines(case.queries)
    for batch in _batches(rows, case.pad_id):
        traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=len(queries))
    for batch in _batches(queries, case.pad_id):
        traker.score(batch=batch, num_samples=len(batch[0]))
    scores = torch.as_tensor(traker.finalize_scores("queries")).float().clone()
    return Scored(queries.back(rows.back(scores, 0), 1), {"K": size, "lambda": 0, "of": "all trainable parameters"})


def _batches(rows: Lines, pad_id: int) -> list[list[Tensor]]:
    starts = range(0, len(rows), BATCH)
    made = [pad(rows.rows[start : start + BATCH], pad_id) for start in starts]
    return [[batch["input_ids"], batch["labels"], batch["attention_mask"]] for batch in made]


METHODS: dict[str, Adapter] = {"trak": trak}
