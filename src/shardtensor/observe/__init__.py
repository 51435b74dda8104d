"""What ranks do: traced, compared, and named where one waits for ever or dies."""
