"""The small real run behind `ckptavg demo`."""
