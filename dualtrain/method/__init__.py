"""The paper's method as pure functions: mixing, objectives, schedules."""
