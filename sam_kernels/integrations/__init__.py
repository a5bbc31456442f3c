"""SAM in trainers that own the training loop. Each module is imported on request, and needs the package that it is named after."""
