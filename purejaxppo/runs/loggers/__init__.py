"""Where the numbers of a run go while it trains: CSV files, TensorBoard, Weights & Biases."""
