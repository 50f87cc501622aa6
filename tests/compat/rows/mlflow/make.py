"""Writes the MLflow model `model`, a folder."""

import os
import time

import mlflow
import pandas


class Sum(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pandas.DataFrame, params=None):
        time.sleep(float(model_input.get("seconds", pandas.Series([0.0])).iloc[0]))
        total = float(model_input["values"].sum())
        return {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": total}


mlflow.pyfunc.save_model("model", python_model=Sum(), pip_requirements=[])
