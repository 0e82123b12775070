"""Evaluation of packages on tables: protocols, metrics, baselines, reports. Needs no torch."""

from tsmoe.evaluate.forecast import ForecastEvaluation, evaluate_forecast
from tsmoe.evaluate.metrics import ForecastMetrics, ForecastScores
from tsmoe.evaluate.report import ForecastPicture, draw_forecast, scores_table

__all__ = [
    "ForecastEvaluation",
    "ForecastMetrics",
    "ForecastPicture",
    "ForecastScores",
    "draw_forecast",
    "evaluate_forecast",
    "scores_table",
]
