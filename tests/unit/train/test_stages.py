import torch

from tsmoe.train.stages import prepare_pretraining


def test_pretraining_rests_the_biases_between_variates_and_nothing_else(make_model) -> None:
    model = make_model()
    assert all(parameter.requires_grad for parameter in model.parameters())
    prepare_pretraining(model)
    resting = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert resting == {
        f"blocks.{layer}.attention.{which}_variate_bias_H"
        for layer in range(2)
        for which in ("same", "other")
    }


def test_every_parameter_that_does_not_rest_gets_a_gradient(make_model, walks_BCL) -> None:
    model = make_model()
    prepare_pretraining(model)
    observed_BCL = torch.ones_like(walks_BCL, dtype=torch.bool)
    model(walks_BCL, observed_BCL).prediction_BCNPK.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
