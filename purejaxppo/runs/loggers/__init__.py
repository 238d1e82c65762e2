"""Loggers write the tables of a run during training: CSV, TensorBoard, Weights & Biases."""
