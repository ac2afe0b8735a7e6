"""The token dispatcher: every all-to-all between routers and experts, behind one interface."""
