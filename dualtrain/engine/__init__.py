"""DeepSpeed, and the only place that knows its insides."""
