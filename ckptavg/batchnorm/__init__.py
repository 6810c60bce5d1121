"""BatchNorm: estimators of its statistics, and the pass over the data that feeds them."""
