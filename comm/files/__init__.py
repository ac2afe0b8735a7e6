"""Files: bounded reads of what others have written, strict JSON and YAML, ranges of fields, durable writes."""
