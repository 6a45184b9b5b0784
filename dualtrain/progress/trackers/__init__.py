"""Where else a run's records go: TensorBoard, Weights & Biases, Trackio, MLflow."""
