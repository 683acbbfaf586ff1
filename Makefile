# For fingers used to make; ./run does the work.
.PHONY: demo test setup
demo test setup:
	@./run $@
