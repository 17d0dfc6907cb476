"""What every room needs and no user imports: errors, checks, noise, derivatives, precision, processes."""
