"""The router of a mixture of experts in a model whose numbers are narrow."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from model import Gemma4Config
from model.moe import Router
from tests.harness.report import report


@torch.no_grad()
def test_the_router_of_a_bfloat16_model_chooses_as_an_exact_one() -> None:
    """At the size of 26B-A4B; rounded to 8 bits, scores of 128 experts tie, and other experts are chosen."""
    torch.manual_seed(0)
    config = Gemma4Config.from_name("26b_a4b")
    router, tokens = Router(config), 512
    for parameter, std in ((router.proj.weight, 0.02), (router.scale, 1.0), (router.per_expert_scale, 1.0)):
        torch.nn.init.normal_(parameter, mean=float(parameter is not router.proj.weight), std=std)
    router.bfloat16()
    exact = deepcopy(router).double()
    x_TD = torch.randn(tokens, config.hidden_size).bfloat16()

    def observed(router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        router.observer = lambda scores_TE, indices_Tk: seen.extend((scores_TE, indices_Tk))
        router(x_TD)
        return seen[0].double(), seen[1].sort(dim=1).values

    scores_TE, chosen_Tk = observed(exact, x_TD.double())
    scale = scores_TE.std()
    ours_TE, ours_Tk = observed(router, x_TD)
    normed = router.norm(x_TD) * router.scale * router.root_size
    rounded_TE = torch.nn.functional.linear(normed, router.proj.weight)
    rounded_Tk = rounded_TE.topk(router.top_k).indices.sort(dim=1).values
    found = {
        name: (float((scores - scores_TE).abs().max() / scale), int((indices != chosen_Tk).any(dim=1).sum()))
        for name, scores, indices in (("float32", ours_TE, ours_Tk), ("rounded", rounded_TE.double(), rounded_Tk))
    }
    for name, (error, others) in found.items():
        report("A router in a bfloat16 model", {"scores": name, "error": f"{error:.1e}", "tokens with others": others})
    assert found["float32"][0] < 1e-5 and found["float32"][1] <= 1
    assert found["rounded"][0] > 1e-3 and found["rounded"][1] > 5
