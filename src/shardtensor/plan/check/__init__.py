"""Is my model right when it is sharded: held against one device, op by op where it is not"""
