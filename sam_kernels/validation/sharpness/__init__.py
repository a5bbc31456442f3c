"""Validation of the operations on one tensor of gradient norms: Gibbs weights, and draws by them."""
