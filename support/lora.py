def add_lora(model, *a): model.add_lora(*a)
def merge_lora(model): model.merge_lora()
