"""What an adapter is asked to be: `NdLoraConfig`, its fields, and what refuses them."""
