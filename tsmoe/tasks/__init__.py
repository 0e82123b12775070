"""The tasks of a supervised model: data, loss, prediction, evaluation."""
