import torch

from tsmoe.heads.point import PointHead


def test_error_is_squared_by_hand() -> None:
    head = PointHead(4, 3)
    prediction_BCNPK = torch.tensor([1.0, 2.0, -1.0]).reshape(1, 1, 1, 3, 1)
    target_BCNP = torch.tensor([1.0, 5.0, 1.0]).reshape(1, 1, 1, 3)
    assert head.point_errors(prediction_BCNPK, target_BCNP).flatten().tolist() == [0, 9, 4]


def test_point_forecast_is_the_one_value() -> None:
    prediction_BCNPK = torch.randn(2, 1, 3, 4, 1)
    head = PointHead(4, 4)
    assert torch.equal(head.point_forecast(prediction_BCNPK), prediction_BCNPK[..., 0])
    assert head.quantile_levels == ()
