from shoestring.comm.topology import LinkType, Topology


def test_ranks_of_every_group() -> None:
    grid = Topology(edp=2, ep=4, gpus_per_node=4)
    assert (grid.world_size, grid.dp) == (8, 8)
    assert grid.ep_ranks(6) == (4, 5, 6, 7)
    assert grid.expert_dp_ranks(6) == (2, 6)
    assert grid.dense_dp_ranks(6) == tuple(range(8))
    assert (grid.ep_rank(6), grid.edp_rank(6), grid.pp_rank(6), grid.dp_rank(6)) == (2, 1, 0, 6)


def test_every_rank_is_in_its_own_groups_and_groups_agree() -> None:
    grid = Topology(edp=3, ep=2)
    for rank in range(grid.world_size):
        for ranks_of in (grid.ep_ranks, grid.expert_dp_ranks, grid.dense_dp_ranks):
            ranks = ranks_of(rank)
            assert rank in ranks
            assert all(ranks_of(other) == ranks for other in ranks)


def test_links() -> None:
    grid = Topology(ep=4, gpus_per_node=2)
    assert grid.link_type(1, 1) is LinkType.LOOPBACK
    assert grid.link_type(0, 1) is LinkType.NVLINK
    assert grid.link_type(1, 2) is LinkType.INFINIBAND


def test_impossible_grids_are_named() -> None:
    assert [problem.field for problem in Topology(ep=0, edp=-1).problems()] == ["edp", "ep"]
    assert [problem.field for problem in Topology(ep=3).problems()] == ["ep"]  # nodes of 8
    assert not list(Topology(pp=3, edp=5, ep=16, gpus_per_node=8).problems())


def test_expert_groups_fill_nodes_and_keep_their_rail() -> None:
    grid = Topology(edp=2, ep=4, gpus_per_node=2)
    assert (grid.nodes_per_ep_group, grid.ep_ranks_per_node) == (2, 2)
    assert grid.ep_intra_node_ranks(7) == (6, 7)
    assert grid.ep_inter_node_ranks(5) == (5, 7)
    small = Topology(ep=2, gpus_per_node=8)
    assert (small.nodes_per_ep_group, small.ep_intra_node_ranks(1), small.ep_inter_node_ranks(1)) == (1, (0, 1), (1,))


def test_pipelines_keep_the_place_in_their_groups() -> None:
    grid = Topology(pp=3, edp=2, ep=2)
    assert grid.pp_ranks(6) == (2, 6, 10)
    assert grid.map_to_pp_ranks(grid.expert_dp_ranks(5), (0, 2)) == (1, 3, 9, 11)
    assert grid.map_to_pp_ranks(grid.dense_dp_ranks(5), (1,)) == (4, 5, 6, 7)
